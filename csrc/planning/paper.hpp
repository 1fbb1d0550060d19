// The paper's two placement algorithms (section 4.2), and the balance of the second one with fewer moves.
#pragma once

#include <cstdint>
#include <vector>

#include "planning/limits.hpp"
#include "planning/quota.hpp"

namespace hecate {

using Owners = std::vector<std::int64_t>;

// Algorithm 1: copies of the `degree` hottest experts, at most `slots` a device.
std::vector<Pair> sparse_materialization(const Tokens& loads, const Owners& owners, const Shape& shape, int degree,
                                         int slots);

// Algorithm 2: owners for all layers; `shape.experts` is not used, layers may differ.
std::vector<Owners> heterogeneous_sharding(const std::vector<Tokens>& layers, const std::vector<int>& degrees,
                                           const Shape& shape);

// Swaps experts within each layer until it is as balanced as `goals`, or no swap helps.
std::vector<Owners> few_moves(const std::vector<Tokens>& layers, std::vector<Owners> owners,
                              const std::vector<Owners>& goals, const std::vector<int>& degrees, int devices);

}  // namespace hecate
