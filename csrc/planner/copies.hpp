// Which experts to copy where: the fewest copies for known loads, or robust ones for loads that are guessed.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "planner/network.hpp"

namespace hecate {

using Pair = std::pair<int, int>;  // expert, device

// What may be copied. A copy takes one unit of `in` at its device and one of `out` at the holder that sends it, which
// may itself be a copy: schedules relay.
struct Limits {
  std::vector<int> in, out;
  const bool* allowed = nullptr;  // [experts, devices], or null: anything

  bool may_enter(const Network& network, int expert, int device) const {
    return in[device] > 0 && (!allowed || allowed[static_cast<std::int64_t>(expert) * network.devices() + device]) &&
           !network.holds(expert, device);
  }
  // The holder with the most sends left, or -1.
  int sender(const Network& network, int expert) const;
  void take(const Network& network, int expert, int device);
};

// Adds copies, as few as a greedy search finds, until no device has more than `target`. False: it cannot.
bool cover(Network& network, std::int64_t target, Limits& limits);

// Adds copies for several guesses of the loads at once until the limits are used up. `levels` holds ever more
// pessimistic sets of guesses, each [guesses, experts]. Returns the copies in the order of their use.
std::vector<Pair> spread(const std::int64_t* levels, int num_levels, int guesses, const std::vector<Pair>& held,
                         int experts, int devices, Limits& limits);

}  // namespace hecate
