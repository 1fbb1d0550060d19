// The CPU twins of the CUDA kernels, by the names of their entry points.
#pragma once

#include <map>
#include <string>

#include "kernels/emulate.hpp"

namespace hecate {

struct Twin {
  void (*run)(const void* args, const LaunchShape& shape, ThreadOrder order);
  std::size_t args_bytes;
};

const std::map<std::string, Twin>& twins();

}  // namespace hecate
