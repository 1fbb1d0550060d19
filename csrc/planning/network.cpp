#include "planning/network.hpp"

#include <algorithm>
#include <numeric>

namespace hecate {

Network::Network(int experts, int devices, int expected_pairs)
    : load(devices, 0), expert_head_(experts, -1), device_head_(devices, -1), degree_(experts, 0),
      held_(static_cast<std::size_t>(experts) * devices, false),
      level_(devices, -1), seen_(experts, 0), next_pair_(devices, -1) {
  for (auto* list : {&expert_of, &device_of, &expert_next_, &device_next_}) list->reserve(expected_pairs);
  amount.reserve(expected_pairs);
  queue_.reserve(devices);
}

int Network::add_pair(int expert, int device, std::int64_t tokens) {
  const int pair = pairs();
  expert_of.push_back(expert);
  device_of.push_back(device);
  amount.push_back(tokens);
  load[device] += tokens;
  expert_next_.push_back(expert_head_[expert]);
  expert_head_[expert] = pair;
  device_next_.push_back(device_head_[device]);
  device_head_[device] = pair;
  ++degree_[expert];
  held_[static_cast<std::size_t>(expert) * load.size() + device] = true;
  return pair;
}

void Network::add_amount(int pair, std::int64_t tokens) {
  amount[pair] += tokens;
  load[device_of[pair]] += tokens;
}

std::int64_t Network::total() const { return std::accumulate(load.begin(), load.end(), std::int64_t{0}); }

// Breadth-first search from all devices above `target`; an edge leads to a device that can take over tokens.
bool Network::levels(std::int64_t target) {
  std::fill(level_.begin(), level_.end(), -1);
  std::fill(seen_.begin(), seen_.end(), 0);
  queue_.clear();
  for (int d = 0; d < devices(); ++d)
    if (load[d] > target) level_[d] = 0, queue_.push_back(d);
  bool sink = false;
  for (std::size_t at = 0; at < queue_.size(); ++at) {
    const int d = queue_[at];
    for (int p = device_head_[d]; p >= 0; p = device_next_[p]) {
      const int e = expert_of[p];
      if (amount[p] == 0 || degree_[e] < 2 || seen_[e]) continue;
      seen_[e] = 1;
      for (int q = expert_head_[e]; q >= 0; q = expert_next_[q]) {
        const int to = device_of[q];
        if (level_[to] >= 0) continue;
        level_[to] = level_[d] + 1;
        sink |= load[to] < target;
        queue_.push_back(to);
      }
    }
  }
  return sink;
}

// Depth-first search along ascending levels; returns how many of `limit` tokens reached a device below `target`.
std::int64_t Network::push(int device, std::int64_t limit, std::int64_t target) {
  std::int64_t sent = 0;
  if (load[device] < target) {
    sent = std::min(limit, target - load[device]);
    load[device] += sent;
  }
  for (int& p = next_pair_[device]; sent < limit && p >= 0; p = device_next_[p]) {
    const int e = expert_of[p];
    if (degree_[e] < 2) continue;
    for (int q = expert_head_[e]; q >= 0 && amount[p] > 0; q = expert_next_[q]) {
      if (level_[device_of[q]] != level_[device] + 1) continue;
      const std::int64_t moved = push(device_of[q], std::min(limit - sent, amount[p]), target);
      amount[p] -= moved;
      amount[q] += moved;
      sent += moved;
      if (sent == limit) return sent;
    }
  }
  return sent;
}

bool Network::drain(std::int64_t target) {
  while (levels(target)) {
    next_pair_ = device_head_;
    for (int d = 0; d < devices(); ++d)
      if (level_[d] == 0) load[d] -= push(d, load[d] - target, target);
  }
  return queue_.empty();
}

// Newton's method on the cut: if drain() fails, the tokens of the devices it marks cannot leave that set, so their mean
// load is a lower bound and becomes the next target.
std::int64_t Network::min_max() {
  std::int64_t target = ceil_div(total(), devices());
  while (!drain(target)) {
    std::int64_t held = 0;
    for (int d : queue_) held += load[d];
    target = ceil_div(held, static_cast<std::int64_t>(queue_.size()));
  }
  return target;
}

}  // namespace hecate
