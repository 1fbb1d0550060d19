// What may be copied where.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "planning/network.hpp"

namespace hecate {

using Pair = std::pair<int, int>;  // expert, device

// A copy takes one unit of `in` at its device and one of `out` at the holder that sends it. That may be another copy:
// schedules relay, so that a hot expert does not cost its owner one send for each copy.
struct Limits {
  std::vector<int> in, out;
  const bool* allowed = nullptr;  // [experts, devices], or null: anything

  // The holder with the most sends left, the first of equals, or -1.
  int sender(const Network& network, int expert) const {
    int best = -1;
    for (int p = network.first_of_expert(expert); p >= 0; p = network.next_of_expert(p)) {
      const int d = network.device_of[p];
      if (out[d] > 0 && (best < 0 || out[d] > out[best] || (out[d] == out[best] && d < best))) best = d;
    }
    return best;
  }

  bool can_send(const Network& network, int expert) const {
    for (int p = network.first_of_expert(expert); p >= 0; p = network.next_of_expert(p))
      if (out[network.device_of[p]] > 0) return true;
    return false;
  }

  bool may_enter(const Network& network, int expert, int device) const {
    return in[device] > 0 && (!allowed || allowed[static_cast<std::int64_t>(expert) * network.devices() + device]) &&
           !network.holds(expert, device);
  }

  void take(const Network& network, int expert, int device) {
    --in[device];
    --out[sender(network, expert)];
  }
};

}  // namespace hecate
