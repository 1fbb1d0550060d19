#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include "planning/paper.hpp"

namespace nb = nanobind;

namespace hecate {

// Arguments are plain lists: these functions are called rarely, and layers have different numbers of experts.
void bind_paper(nb::module_& m) {
  const auto release = nb::call_guard<nb::gil_scoped_release>();
  m.def(
      "sparse_materialization",
      [](const Tokens& loads, const Owners& owners, int devices, int devices_per_node, int degree, int slots) {
        const Shape shape{devices, static_cast<int>(loads.size()), devices_per_node};
        return sparse_materialization(loads, owners, shape, degree, slots);
      },
      nb::arg("loads"), nb::arg("owners"), nb::arg("devices"), nb::arg("devices_per_node"), nb::arg("degree"),
      nb::arg("slots"), release);
  m.def(
      "heterogeneous_sharding",
      [](const std::vector<Tokens>& layers, const std::vector<int>& degrees, int devices, int devices_per_node) {
        return heterogeneous_sharding(layers, degrees, {devices, 0, devices_per_node});
      },
      nb::arg("layers"), nb::arg("degrees"), nb::arg("devices"), nb::arg("devices_per_node"), release);
  m.def("few_moves", &few_moves, nb::arg("layers"), nb::arg("owners"), nb::arg("goals"), nb::arg("degrees"),
        nb::arg("devices"), release);
}

}  // namespace hecate
