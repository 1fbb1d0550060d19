#include "planning/network.hpp"

#include <algorithm>
#include <numeric>

namespace hecate {

Flow::Flow(int experts, int devices, int expected_pairs)
    : load(devices, 0), level_(devices, -1), next_pair_(devices, -1), expert_level_(experts, -1), next_holder_(experts, -1) {
  amount.reserve(expected_pairs);
  queue_.reserve(devices);
}

void Flow::add_pair(int device, std::int64_t tokens) {
  amount.push_back(tokens);
  load[device] += tokens;
}

void Flow::add_amount(const Holding& holding, int pair, std::int64_t tokens) {
  amount[pair] += tokens;
  load[holding.device_of[pair]] += tokens;
}

std::int64_t Flow::total() const { return std::accumulate(load.begin(), load.end(), std::int64_t{0}); }

// Breadth-first search from all devices above `target`; an edge leads to a device that can take over tokens. An expert
// has the level of the first device that it is found on.
bool Flow::levels(const Holding& holding, std::int64_t target) {
  const int devices = static_cast<int>(load.size());
  queue_.clear();
  for (int d = 0; d < devices; ++d) {
    level_[d] = -1;
    if (load[d] > target) enter(holding, d, 0);
  }
  if (queue_.empty()) return false;
  std::fill(expert_level_.begin(), expert_level_.end(), -1);
  bool sink = false;
  for (std::size_t at = 0; at < queue_.size(); ++at) {
    const int d = queue_[at];
    for (int p = holding.first_shared(d); p >= 0; p = holding.next_shared(p)) {
      const int e = holding.expert_of[p];
      if (amount[p] == 0 || expert_level_[e] >= 0) continue;
      expert_level_[e] = level_[d];
      next_holder_[e] = holding.first_of_expert(e);
      for (int q = next_holder_[e]; q >= 0; q = holding.next_of_expert(q)) {
        const int to = holding.device_of[q];
        if (level_[to] >= 0) continue;
        enter(holding, to, level_[d] + 1);
        sink |= load[to] < target;
      }
    }
  }
  return sink;
}

void Flow::enter(const Holding& holding, int device, int level) {
  level_[device] = level;
  next_pair_[device] = holding.first_shared(device);
  queue_.push_back(device);
}

// Depth-first search along ascending levels; returns how many of `limit` tokens reached a device below `target`. What
// has turned out to lead to none any more is not entered again (Dinic's algorithm).
std::int64_t Flow::push(const Holding& holding, int device, std::int64_t limit, std::int64_t target) {
  std::int64_t sent = 0;
  if (load[device] < target) {
    sent = std::min(limit, target - load[device]);
    load[device] += sent;
  }
  for (int& p = next_pair_[device]; sent < limit && p >= 0; p = holding.next_shared(p)) {
    const int e = holding.expert_of[p];
    if (amount[p] == 0 || expert_level_[e] != level_[device]) continue;
    for (int& q = next_holder_[e]; q >= 0; q = holding.next_of_expert(q)) {
      const int to = holding.device_of[q];
      if (level_[to] != level_[device] + 1) continue;
      const std::int64_t moved = push(holding, to, std::min(limit - sent, amount[p]), target);
      amount[p] -= moved;
      amount[q] += moved;
      sent += moved;
      if (sent == limit) return sent;
      if (amount[p] == 0) break;
    }
  }
  return sent;
}

bool Flow::drain(const Holding& holding, std::int64_t target) {
  while (levels(holding, target))
    for (int d : queue_) {
      if (level_[d] > 0) break;
      load[d] -= push(holding, d, load[d] - target, target);
    }
  return queue_.empty();
}

// Newton's method on the cut: if drain() fails, the tokens of the devices it marks cannot leave that set, so their mean
// load is a lower bound and becomes the next target.
std::int64_t Flow::min_max(const Holding& holding, std::int64_t target) {
  while (!drain(holding, target)) {
    std::int64_t held = 0;
    for (int d : queue_) held += load[d];
    target = ceil_div(held, static_cast<std::int64_t>(queue_.size()));
  }
  return target;
}

}  // namespace hecate
