// The fewest copies for loads that are known: after the gate, where every copied byte is exposed.
#pragma once

#include <cstdint>
#include <vector>

#include "planning/limits.hpp"
#include "planning/quota.hpp"

namespace hecate {

// Whether nodes are balanced before the devices in each, so that few experts cross: never; yes, but where that cannot
// reach the target all devices at once; or always, because crossings are limited. The less slack the nodes are left
// with, the more remains for their devices: first all of it is the nodes', then half, then none.
enum class Order { kFlat, kNodesFirst, kNodesOnly };

// What to do when the greedy search fails: nothing, or to fill whole rooms, which takes more copies, and at last to try
// all sets of copies as far as time allows. If that ends, there is none. A fit for guessed loads is not worth copies
// that leave no slack.
enum class Effort { kGreedy, kAll };

// Further copies that leave no device more than `target` tokens: as few as a greedy search finds, or if nothing gets
// there, those that get closest. `loads` per expert, `held` the holders so far.
std::vector<Pair> few_copies(const Tokens& loads, const Holders& held, const Shape& shape, std::int64_t target,
                             const Limits& limits, const Limits* node_limits, Order order, Effort effort);

}  // namespace hecate
