#include "kernels/twins.hpp"

#include "activation.cuh"
#include "combine.cuh"
#include "permute.cuh"
#include "quota.cuh"
#include "sort.cuh"
#include "stack.cuh"
#include "symmetric.cuh"

namespace hecate {

#define HECATE_TWIN(name, ...) {#name, {&emulate<__VA_ARGS__>, sizeof(typename __VA_ARGS__::Args)}},

const std::map<std::string, Twin>& twins() {
  static const std::map<std::string, Twin> all = {
      HECATE_SORT(HECATE_TWIN) HECATE_PERMUTE(HECATE_TWIN) HECATE_COMBINE(HECATE_TWIN) HECATE_STACK(HECATE_TWIN)
          HECATE_ACTIVATION(HECATE_TWIN) HECATE_QUOTA(HECATE_TWIN) HECATE_SYMMETRIC(HECATE_TWIN)};
  return all;
}

}  // namespace hecate
