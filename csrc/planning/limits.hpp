// Limits on copies: which experts may be copied to which devices, and how many copies each device may get and send.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "planning/holding.hpp"

namespace hecate {

using Pair = std::pair<int, int>;  // expert, device

// A copy uses one unit of `in` of its device and one unit of `out` of the holder that sends it. The sender may itself
// hold a copy: routes relay, so that the owner of a hot expert need not send every copy.
struct Limits {
  std::vector<int> in, out;
  const bool* allowed = nullptr;  // [experts, devices]; null: all copies are allowed

  // The holder with the most sends left (the first one on a tie), or -1 if none has any left.
  int sender(const Holding& holding, int expert) const {
    int best = -1;
    for (int p = holding.first_of_expert(expert); p >= 0; p = holding.next_of_expert(p)) {
      const int d = holding.device_of[p];
      if (out[d] > 0 && (best < 0 || out[d] > out[best] || (out[d] == out[best] && d < best))) best = d;
    }
    return best;
  }

  bool can_send(const Holding& holding, int expert) const {
    for (int p = holding.first_of_expert(expert); p >= 0; p = holding.next_of_expert(p))
      if (out[holding.device_of[p]] > 0) return true;
    return false;
  }

  bool may_enter(const Holding& holding, int expert, int device) const {
    return in[device] > 0 && (!allowed || allowed[static_cast<std::int64_t>(expert) * holding.devices() + device]) &&
           !holding.holds(expert, device);
  }

  void take(const Holding& holding, int expert, int device) {
    --in[device];
    --out[sender(holding, expert)];
  }
};

}  // namespace hecate
