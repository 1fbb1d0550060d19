#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <initializer_list>
#include <memory>
#include <vector>

#include "planning/tables.hpp"

namespace nb = nanobind;

namespace hecate {

namespace {

using Matrix = nb::ndarray<const std::int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<nb::numpy, std::int64_t>;

Traffic traffic_of(const Matrix& holders, const Matrix& quota) {
  return {holders.data(), quota.data(), static_cast<int>(quota.shape(0)), static_cast<int>(quota.shape(1))};
}

// One array of all parts, so that one transfer brings them to an accelerator.
Out joined(std::initializer_list<const std::vector<std::int64_t>*> parts) {
  std::size_t size = 0;
  for (const auto* part : parts) size += part->size();
  std::unique_ptr<std::int64_t[]> memory(new std::int64_t[size]);
  std::int64_t* at = memory.get();
  for (const auto* part : parts) at = std::copy(part->begin(), part->end(), at);
  nb::capsule owner(memory.get(), [](void* p) noexcept { delete[] static_cast<std::int64_t*>(p); });
  return Out(memory.release(), {size}, owner);
}

// Shifts and rows of the first blocks, then of the second.
Out joined(const Blocks& first, const Blocks& second) {
  return joined({&first.shift, &first.rows, &second.shift, &second.rows});
}

nb::tuple direct_tables(const Matrix& holders, const Matrix& quota, int rank, const std::vector<int>& local_rows) {
  const Traffic traffic = traffic_of(holders, quota);
  const Departures out = departures(traffic, rank);
  const Arrivals in = arrivals(traffic, rank, local_rows);
  const Blocks nothing;
  return nb::make_tuple(joined(out.blocks, in.sorted ? nothing : in.blocks), out.blocks.rows.size(),
                        nb::tuple(nb::cast(out.sent)), nb::tuple(nb::cast(in.received)), nb::tuple(nb::cast(in.sizes)));
}

nb::tuple arrival_table(const Matrix& holders, const Matrix& quota, int rank, const std::vector<int>& local_rows) {
  const Arrivals in = arrivals(traffic_of(holders, quota), rank, local_rows);
  const Blocks nothing;
  return nb::make_tuple(joined(nothing, in.sorted ? nothing : in.blocks), nb::tuple(nb::cast(in.received)),
                        nb::tuple(nb::cast(in.sizes)));
}

// What the sorting kernel takes: where each expert's pairs begin, each pair's copies before and first row; then the
// blocks of received rows.
nb::tuple sort_tables(const Matrix& holders, const Matrix& quota, int rank, const std::vector<int>& local_rows,
                      int experts) {
  const Traffic traffic = traffic_of(holders, quota);
  const Departures out = departures(traffic, rank);
  const Arrivals in = arrivals(traffic, rank, local_rows);
  std::vector<std::int64_t> first(experts + 1, 0), before(traffic.pairs, 0);
  for (int p = 0; p < traffic.pairs; ++p) ++first[traffic.holders[2 * p] + 1];
  for (int e = 0; e < experts; ++e) first[e + 1] += first[e];
  const std::int64_t* to_pair = traffic.quota + std::int64_t{rank} * traffic.pairs;
  for (int p = 1; p < traffic.pairs; ++p)
    if (traffic.holders[2 * p] == traffic.holders[2 * (p - 1)]) before[p] = before[p - 1] + to_pair[p - 1];
  const Blocks blocks = in.sorted ? Blocks{} : in.blocks;
  return nb::make_tuple(joined({&first, &before, &out.start, &blocks.shift, &blocks.rows}),
                        nb::tuple(nb::cast(out.sent)), nb::tuple(nb::cast(in.received)), nb::tuple(nb::cast(in.sizes)));
}

nb::tuple rows_within(const Matrix& holders, const Matrix& quota, int devices_per_node) {
  const Locality found = locality(traffic_of(holders, quota), devices_per_node);
  return nb::make_tuple(found.rows, found.within_nodes);
}

}  // namespace

void bind_tables(nb::module_& m) {
  m.def("direct_tables", &direct_tables, nb::arg("holders"), nb::arg("quota"), nb::arg("rank"), nb::arg("local_rows"));
  m.def("sort_tables", &sort_tables, nb::arg("holders"), nb::arg("quota"), nb::arg("rank"), nb::arg("local_rows"),
        nb::arg("experts"));
  m.def("arrival_table", &arrival_table, nb::arg("holders"), nb::arg("quota"), nb::arg("rank"), nb::arg("local_rows"));
  m.def("rows_within_nodes", &rows_within, nb::arg("holders"), nb::arg("quota"), nb::arg("devices_per_node"));
}

}  // namespace hecate
