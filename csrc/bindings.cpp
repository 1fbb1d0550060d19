// The extension module; every part of the C++ code registers its functions here.
#include <nanobind/nanobind.h>

namespace nb = nanobind;

namespace hecate {
void bind_paper(nb::module_& m);
void bind_planning(nb::module_& m);
void bind_tables(nb::module_& m);
void bind_collectives(nb::module_& m);
void bind_kernels(nb::module_& m);
}  // namespace hecate

NB_MODULE(_native, m) {
  m.doc() = "Planning and schedules in C++, and the CUDA kernels on the CPU (no torch, no CUDA).";
  hecate::bind_paper(m);
  hecate::bind_planning(m);
  hecate::bind_tables(m);
  hecate::bind_collectives(m);
  hecate::bind_kernels(m);
}
