#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "kernels/twins.hpp"

namespace nb = nanobind;

namespace hecate {

namespace {

using Words = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

const Twin& twin(const std::string& name) {
  const auto found = twins().find(name);
  if (found == twins().end()) throw std::invalid_argument("no kernel is called " + name);
  return found->second;
}

// `args` are the fields of the kernel's argument struct, 8 bytes each; addresses are of CPU memory.
void run_kernel(const std::string& name, const Words& args, std::int64_t blocks, int width, int height,
                std::int64_t shared_bytes, int order) {
  const Twin& found = twin(name);
  if (args.nbytes() != found.args_bytes)
    throw std::invalid_argument(name + ": " + std::to_string(args.nbytes()) + " bytes of arguments, it takes " +
                                std::to_string(found.args_bytes));
  nb::gil_scoped_release release;
  found.run(args.data(), {blocks, width, height, static_cast<std::size_t>(shared_bytes)},
            static_cast<ThreadOrder>(order));
}

std::vector<std::string> kernel_names() {
  std::vector<std::string> names;
  for (const auto& [name, twin] : twins()) names.push_back(name);
  return names;
}

}  // namespace

void bind_kernels(nb::module_& m) {
  m.def("run_kernel", &run_kernel, nb::arg("name"), nb::arg("args"), nb::arg("blocks"), nb::arg("width"),
        nb::arg("height"), nb::arg("shared_bytes"), nb::arg("order"));
  m.def("kernel_names", &kernel_names);
}

}  // namespace hecate
