// The fewest copies for loads that are known: after the gate, where every copied byte is exposed.
#pragma once

#include <cstdint>
#include <vector>

#include "planner/limits.hpp"
#include "planner/quota.hpp"

namespace hecate {

// Further copies that leave no device more than `target` tokens: as few as a greedy search finds, or if it cannot get
// there, those that get closest. `loads` per expert, `held` the holders so far. With `node_limits` the nodes are
// balanced first, and then the devices inside each, so that few experts cross.
std::vector<Pair> cover(const Tokens& loads, const Holders& held, const Shape& shape,
                        std::int64_t target, const Limits& limits, const Limits* node_limits);

}  // namespace hecate
