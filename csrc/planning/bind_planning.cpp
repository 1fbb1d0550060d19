#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <memory>
#include <numeric>

#include "planning/few_copies.hpp"
#include "planning/plan_check.hpp"
#include "planning/quota.hpp"
#include "planning/robust_copies.hpp"

namespace nb = nanobind;

namespace hecate {

namespace {

using Counts = nb::ndarray<const std::int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Holding = nb::ndarray<const bool, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<nb::numpy, std::int64_t>;

template <typename T>
T* release_to(std::unique_ptr<T[]>& memory, nb::capsule& owner) {
  owner = nb::capsule(memory.get(), [](void* p) noexcept { delete[] static_cast<T*>(p); });
  return memory.release();
}

Shape shape_of(const Counts& counts, int devices_per_node) {
  return {static_cast<int>(counts.shape(0)), static_cast<int>(counts.shape(1)), devices_per_node};
}

// int64 [pairs, 2]: (expert, device), ascending.
Out pairs_of(const Holders& holders) {
  const std::size_t pairs = holders.expert.size();
  std::unique_ptr<std::int64_t[]> flat(new std::int64_t[2 * pairs]);
  for (std::size_t p = 0; p < pairs; ++p) flat[2 * p] = holders.expert[p], flat[2 * p + 1] = holders.device[p];
  nb::capsule owner;
  std::int64_t* data = release_to(flat, owner);
  return Out(data, {pairs, 2}, owner);
}

// The pairs of a placement and the quota over them.
template <typename Fill>
nb::tuple assigned(const Counts& counts, const Holding& placement, int devices_per_node, Fill fill) {
  std::unique_ptr<std::int64_t[]> quota;
  const Shape shape = shape_of(counts, devices_per_node);
  Holders holders;
  {
    nb::gil_scoped_release release;
    holders = holders_of(placement.data(), shape);
    quota.reset(new std::int64_t[shape.devices * holders.expert.size()]);
    fill(holders, shape, quota.get());
  }
  nb::capsule owner;
  std::int64_t* data = release_to(quota, owner);
  return nb::make_tuple(pairs_of(holders), Out(data, {counts.shape(0), holders.expert.size()}, owner));
}

nb::tuple exact_assignment(const Counts& counts, const Holding& placement, int devices_per_node) {
  return assigned(counts, placement, devices_per_node, [&](const Holders& holders, const Shape& shape, auto* quota) {
    const auto limit = min_max_load(column_sums(counts.data(), shape), holders, shape);
    const auto amounts = local_amounts(counts.data(), holders, shape, limit);
    split_by_source(counts.data(), holders, amounts, shape, quota);
  });
}

nb::tuple even_assignment(const Counts& counts, const Holding& placement, int devices_per_node) {
  return assigned(counts, placement, devices_per_node, [&](const Holders& holders, const Shape& shape, auto* quota) {
    even_quota(counts.data(), holders, shape, quota);
  });
}

// Whether max/mean device load can be at most `ppm` / 1000000; at least the mean rounded up is always allowed.
bool within(const Counts& counts, const Holding& placement, std::int64_t ppm) {
  nb::gil_scoped_release release;
  const Shape shape = shape_of(counts, 1);
  const Tokens loads = column_sums(counts.data(), shape);
  const std::int64_t total = std::accumulate(loads.begin(), loads.end(), std::int64_t{0});
  const std::int64_t wanted = static_cast<std::int64_t>(static_cast<__int128>(total) * ppm / (shape.devices * 1000000LL));
  const std::int64_t target = std::min(total, std::max(wanted, ceil_div(total, shape.devices)));
  return balances(loads, holders_of(placement.data(), shape), shape, target);
}

using Vector = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Pairs = nb::ndarray<const std::int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;  // expert, device
using Levels = nb::ndarray<const std::int64_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

template <typename T>
Out vector_array(const std::vector<T>& values, std::initializer_list<std::size_t> shape) {
  std::unique_ptr<std::int64_t[]> memory(new std::int64_t[values.size()]);
  std::copy(values.begin(), values.end(), memory.get());
  nb::capsule owner;
  std::int64_t* data = release_to(memory, owner);
  return Out(data, shape, owner);
}

Out holders_array(const Holding& placement) {
  const Shape shape{static_cast<int>(placement.shape(1)), static_cast<int>(placement.shape(0)), 1};
  return pairs_of(holders_of(placement.data(), shape));
}

PlanArrays plan_arrays(const Holding& placement, const Vector& owners, const Counts& holders, const Counts& quota,
                       const std::int64_t* loads = nullptr) {
  return {placement.data(), owners.data(), holders.data(), quota.data(), loads,
          static_cast<std::int64_t>(holders.shape(0))};
}

Shape placement_shape(const Holding& placement, int devices_per_node) {
  return {static_cast<int>(placement.shape(1)), static_cast<int>(placement.shape(0)), devices_per_node};
}

nb::tuple plan_sums(const Holding& placement, const Vector& owners, const Counts& holders, const Counts& quota,
                    int devices_per_node) {
  const PlanArrays plan = plan_arrays(placement, owners, holders, quota);
  const Shape shape = placement_shape(placement, devices_per_node);
  return nb::make_tuple(vector_array(device_loads(plan, shape), {placement.shape(1)}), count_crossings(plan, shape));
}

std::string plan_fault_of(const Holding& placement, const Vector& owners, const Counts& holders, const Counts& quota,
                          const Vector& loads) {
  return plan_fault(plan_arrays(placement, owners, holders, quota, loads.data()), placement_shape(placement, 1));
}

Limits limits_of(const Vector& in, const Vector& out, const bool* allowed = nullptr) {
  return {{in.data(), in.data() + in.shape(0)}, {out.data(), out.data() + out.shape(0)}, allowed};
}

Out pairs_array(const std::vector<Pair>& pairs) {
  std::unique_ptr<std::int64_t[]> memory(new std::int64_t[2 * pairs.size()]);
  for (std::size_t i = 0; i < pairs.size(); ++i)
    memory[2 * i] = pairs[i].first, memory[2 * i + 1] = pairs[i].second;
  nb::capsule owner;
  std::int64_t* data = release_to(memory, owner);
  return Out(data, {pairs.size(), 2}, owner);
}

std::int64_t lower_bound_of(const Vector& loads, const Vector& owners, const Vector& slots) {
  nb::gil_scoped_release release;
  return lower_bound_load({loads.data(), loads.data() + loads.shape(0)}, owners.data(),
                          {slots.data(), slots.data() + slots.shape(0)});
}

Out min_max_array(const Counts& loads, const Holding& placement) {
  const std::size_t rows = loads.shape(0), experts = loads.shape(1);
  std::unique_ptr<std::int64_t[]> least(new std::int64_t[rows]);
  {
    nb::gil_scoped_release release;
    const Shape shape{static_cast<int>(placement.shape(1)), static_cast<int>(experts), 1};
    const Holders holders = holders_of(placement.data(), shape);
    for (std::size_t r = 0; r < rows; ++r)
      least[r] = min_max_load({loads.data() + r * experts, loads.data() + (r + 1) * experts}, holders, shape);
  }
  nb::capsule owner;
  std::int64_t* data = release_to(least, owner);
  return Out(data, {rows}, owner);
}

Out holder_loads_array(const Vector& loads, const Holding& placement) {
  std::vector<std::int64_t> amounts;
  {
    nb::gil_scoped_release release;
    const Shape shape = placement_shape(placement, 1);
    amounts = holder_loads({loads.data(), loads.data() + loads.shape(0)}, holders_of(placement.data(), shape), shape);
  }
  return vector_array(amounts, {amounts.size()});
}

Out robust_copies_array(const Levels& levels, const Vector& owners, const Pairs& given, const Vector& in,
                        const Vector& out, const Holding& allowed, int trials) {
  std::vector<Pair> copies;
  {
    nb::gil_scoped_release release;
    const Guesses guesses{levels.data(), static_cast<int>(levels.shape(0)), static_cast<int>(levels.shape(1)),
                          static_cast<int>(levels.shape(2))};
    const std::vector<int> owner_of(owners.data(), owners.data() + owners.shape(0));
    std::vector<Pair> held;
    for (std::size_t p = 0; p < given.shape(0); ++p) held.emplace_back(given(p, 0), given(p, 1));
    copies = robust_copies(guesses, owner_of, held, limits_of(in, out, allowed.data()), trials);
  }
  return pairs_array(copies);
}

// Copies that bring every device down to `target`, or as close to it as the search finds.
Out few_copies_array(const Vector& loads, const Holding& placement, int devices_per_node, std::int64_t target,
                const Vector& in, const Vector& out, const Vector& node_in, const Vector& node_out, int order) {
  std::vector<Pair> copies;
  {
    nb::gil_scoped_release release;
    const Shape shape{static_cast<int>(placement.shape(1)), static_cast<int>(placement.shape(0)), devices_per_node};
    const Limits limits = limits_of(in, out), node_limits = limits_of(node_in, node_out);
    copies = few_copies({loads.data(), loads.data() + shape.experts}, holders_of(placement.data(), shape), shape, target,
                   limits, &node_limits, static_cast<Order>(order), Effort::kAll);
  }
  return pairs_array(copies);
}

}  // namespace

void bind_planning(nb::module_& m) {
  m.def("exact_assignment", &exact_assignment, nb::arg("counts"), nb::arg("placement"), nb::arg("devices_per_node"));
  m.def("even_assignment", &even_assignment, nb::arg("counts"), nb::arg("placement"), nb::arg("devices_per_node"));
  m.def("within", &within, nb::arg("counts"), nb::arg("placement"), nb::arg("ppm"));
  m.def("holders", &holders_array, nb::arg("placement"));
  m.def("plan_sums", &plan_sums, nb::arg("placement"), nb::arg("owners"), nb::arg("holders"), nb::arg("quota"),
        nb::arg("devices_per_node"));
  m.def("plan_fault", &plan_fault_of, nb::arg("placement"), nb::arg("owners"), nb::arg("holders"), nb::arg("quota"),
        nb::arg("device_loads"));
  m.def("lower_bound", &lower_bound_of, nb::arg("loads"), nb::arg("owners"), nb::arg("slots"));
  m.def("min_max_loads", &min_max_array, nb::arg("loads"), nb::arg("placement"));
  m.def("holder_loads", &holder_loads_array, nb::arg("loads"), nb::arg("placement"));
  m.def("robust_copies", &robust_copies_array, nb::arg("levels"), nb::arg("owners"), nb::arg("given"), nb::arg("limit_in"),
        nb::arg("limit_out"), nb::arg("allowed"), nb::arg("trials"));
  m.def("few_copies", &few_copies_array, nb::arg("loads"), nb::arg("placement"), nb::arg("devices_per_node"), nb::arg("target"),
        nb::arg("limit_in"), nb::arg("limit_out"), nb::arg("node_in"), nb::arg("node_out"), nb::arg("order"));
}

}  // namespace hecate
