// The paper's two placement algorithms (section 4.2), and swaps that reach the second one's balance with fewer moves.
#pragma once

#include <cstdint>
#include <vector>

#include "planning/limits.hpp"
#include "planning/quota.hpp"

namespace hecate {

using Owners = std::vector<std::int64_t>;

// Algorithm 1: copies of the `degree` hottest experts, at most `slots` per device.
std::vector<Pair> sparse_materialization(const Tokens& loads, const Owners& owners, const Shape& shape, int degree,
                                         int slots);

// Algorithm 2: owners for all layers. `shape.experts` is not used, since layers may have different numbers of experts.
std::vector<Owners> heterogeneous_sharding(const std::vector<Tokens>& layers, const std::vector<int>& degrees,
                                           const Shape& shape);

// Swaps experts within each layer until its largest device load is at most its entry of `goals`, or no swap helps.
std::vector<Owners> few_moves(const std::vector<Tokens>& layers, std::vector<Owners> owners,
                              const std::vector<Owners>& goals, const std::vector<int>& degrees, int devices);

}  // namespace hecate
