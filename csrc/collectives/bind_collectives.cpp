#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <memory>
#include <stdexcept>
#include <string>

#include "collectives/route.hpp"

namespace nb = nanobind;

namespace hecate {

namespace {

using Holding = nb::ndarray<const bool, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Vector = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<nb::numpy, std::int64_t>;

constexpr std::size_t kColumns = 10;

// int64 [hops, 10]: round, expert, piece, pieces, src, dst, first, partial, final, alone.
Out hops_array(const Route& route) {
  std::unique_ptr<std::int64_t[]> memory(new std::int64_t[kColumns * route.hops.size()]);
  for (std::size_t i = 0; i < route.hops.size(); ++i) {
    const Hop& h = route.hops[i];
    const std::int64_t row[kColumns] = {route.round[i], h.expert, h.piece, h.pieces, h.src,
                                        h.dst,          h.first,  h.partial, h.final,  h.alone};
    std::copy(row, row + kColumns, memory.get() + kColumns * i);
  }
  const nb::capsule owner(memory.get(), [](void* p) noexcept { delete[] static_cast<std::int64_t*>(p); });
  return Out(memory.release(), {route.hops.size(), kColumns}, owner);
}

std::string arity(int value) {
  return value == kAll ? "all" : value == kBinomial ? "binomial" : std::to_string(value);
}

std::string name_of(const Travel& shape) {
  if (shape.direct) return "direct";
  return "pieces " + std::to_string(shape.pieces) + ", inside " + arity(shape.inside) + ", across " +
         arity(shape.across) + (shape.spread ? ", spread" : "");
}

nb::tuple route(const std::string& kind, const Holding& holds, const Vector& owners, int devices_per_node,
                std::int64_t chunk_bytes, std::int64_t partial_bytes, const Vector& links) {
  if (kind != "gather" && kind != "reduce") throw std::invalid_argument("route: kind must be gather or reduce");
  if (holds.shape(0) >= kMostDevices || holds.shape(1) >= kMostDevices)
    throw std::invalid_argument("route: must have fewer than 65536 experts and devices");
  const std::int64_t* l = links.data();
  const Request request{static_cast<int>(holds.shape(0)),
                        static_cast<int>(holds.shape(1)),
                        devices_per_node,
                        holds.data(),
                        owners.data(),
                        chunk_bytes,
                        partial_bytes,
                        {l[0], l[1], l[2], l[3], l[4], l[5]}};
  Route found;
  {
    nb::gil_scoped_release release;
    found = kind == "gather" ? gather_route(request) : reduce_route(request);
  }
  return nb::make_tuple(hops_array(found), name_of(found.shape), found.predicted_ns, found.direct_ns, found.bound_ns);
}

}  // namespace

void bind_collectives(nb::module_& m) {
  m.def("route", &route, nb::arg("kind"), nb::arg("holds"), nb::arg("owners"), nb::arg("devices_per_node"),
        nb::arg("chunk_bytes"), nb::arg("partial_bytes"), nb::arg("links"));
}

}  // namespace hecate
