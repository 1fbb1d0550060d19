// As few copies as possible for known loads: used after the gate, when no other work hides the copying.
#pragma once

#include <cstdint>
#include <vector>

#include "planning/limits.hpp"
#include "planning/quota.hpp"

namespace hecate {

// Whether nodes are balanced before the devices in each, so that few experts cross nodes. Flat: never. NodesFirst: yes,
// but if that does not reach the target, all devices at once. NodesOnly: always, because crossings are limited.
// Balancing nodes less strictly needs fewer crossings but leaves their devices less slack: the nodes may use all of the
// slack at first, then half of it, then none.
enum class Order { kFlat, kNodesFirst, kNodesOnly };

// What to do if the greedy search fails: nothing; or first fill devices up to the target, which needs more copies, and
// then try all sets of copies within a limit on their number (if all were tried, no solution exists). Guessed loads are
// not worth this, since the copies it finds leave no slack.
enum class Effort { kGreedy, kAll };

// Further copies after which no device has more than `target` tokens: as few as the search finds, or, if the target
// cannot be reached, those that come closest. `loads` are tokens per expert, `held` are the holders so far.
std::vector<Pair> few_copies(const Tokens& loads, const Holders& held, const Shape& shape, std::int64_t target,
                             const Limits& limits, const Limits* node_limits, Order order, Effort effort);

}  // namespace hecate
