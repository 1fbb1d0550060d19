#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>

#include "planning/tables.hpp"

namespace nb = nanobind;

namespace hecate {

namespace {

using Matrix = nb::ndarray<const std::int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<nb::numpy, std::int64_t>;

Traffic traffic_of(const Matrix& holders, const Matrix& quota) {
  return {holders.data(), quota.data(), static_cast<int>(quota.shape(0)), static_cast<int>(quota.shape(1))};
}

// One array of all blocks, so that one transfer brings them to an accelerator: shifts and rows of the first, then of
// the second.
Out joined(const Blocks& first, const Blocks& second) {
  const std::size_t size = 2 * (first.rows.size() + second.rows.size());
  std::unique_ptr<std::int64_t[]> memory(new std::int64_t[size]);
  std::int64_t* at = memory.get();
  for (const auto* part : {&first.shift, &first.rows, &second.shift, &second.rows})
    at = std::copy(part->begin(), part->end(), at);
  nb::capsule owner(memory.get(), [](void* p) noexcept { delete[] static_cast<std::int64_t*>(p); });
  return Out(memory.release(), {size}, owner);
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

nb::tuple rows_within(const Matrix& holders, const Matrix& quota, int devices_per_node) {
  const Locality found = locality(traffic_of(holders, quota), devices_per_node);
  return nb::make_tuple(found.rows, found.within_nodes);
}

}  // namespace

void bind_tables(nb::module_& m) {
  m.def("direct_tables", &direct_tables, nb::arg("holders"), nb::arg("quota"), nb::arg("rank"), nb::arg("local_rows"));
  m.def("arrival_table", &arrival_table, nb::arg("holders"), nb::arg("quota"), nb::arg("rank"), nb::arg("local_rows"));
  m.def("rows_within_nodes", &rows_within, nb::arg("holders"), nb::arg("quota"), nb::arg("devices_per_node"));
}

}  // namespace hecate
