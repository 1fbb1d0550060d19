#include "planning/min_cost.hpp"

#include <algorithm>
#include <limits>

namespace hecate {

namespace {
constexpr std::int64_t kFar = std::numeric_limits<std::int64_t>::max() / 4;
// An arc's length is cost * kHop + 1, so that of all least-cost paths those with the fewest arcs are shortest. Hence
// the admissible arcs form no cycle.
constexpr std::int64_t kHop = std::int64_t{1} << 20;

// Recovers the cost from a sum of at most kHop - 1 lengths; rounds down, also if the sum is negative.
std::int64_t cost_of(std::int64_t length) { return length >= 0 ? length / kHop : -((-length + kHop - 1) / kHop); }
}  // namespace

MinCostFlow::MinCostFlow(int vertices, int expected_arcs)
    : head_(vertices, -1), pointer_(vertices, -1), distance_(vertices, kFar), queued_(vertices, 0) {
  for (auto* list : {&next_, &to_, &cost_}) list->reserve(2 * expected_arcs);
  room_.reserve(2 * expected_arcs);
}

int MinCostFlow::add_arc(int from, int to, std::int64_t capacity, std::int64_t flow, int cost) {
  const int arc = static_cast<int>(to_.size());
  const auto add = [this](int tail, int head, std::int64_t room, int price) {
    next_.push_back(head_[tail]);
    head_[tail] = static_cast<int>(to_.size());
    to_.push_back(head);
    room_.push_back(room);
    cost_.push_back(price);
  };
  add(from, to, capacity - flow, cost);
  add(to, from, flow, -cost);
  return arc;
}

// Shortest paths from all vertices with excess, by label correcting (Bellman-Ford with a queue).
bool MinCostFlow::distances(const std::vector<std::int64_t>& excess) {
  std::fill(distance_.begin(), distance_.end(), kFar);
  queue_.clear();
  for (int v = 0; v < static_cast<int>(head_.size()); ++v)
    if (excess[v] > 0) distance_[v] = 0, queue_.push_back(v), queued_[v] = 1;
  for (std::size_t at = 0; at < queue_.size(); ++at) {
    const int v = queue_[at];
    queued_[v] = 0;
    for (int a = head_[v]; a >= 0; a = next_[a]) {
      const std::int64_t length = distance_[v] + cost_[a] * kHop + 1;
      if (room_[a] == 0 || length >= distance_[to_[a]]) continue;
      distance_[to_[a]] = length;
      if (!queued_[to_[a]]) queued_[to_[a]] = 1, queue_.push_back(to_[a]);
    }
  }
  std::int64_t least = kFar;
  for (int v = 0; v < static_cast<int>(head_.size()); ++v)
    if (excess[v] < 0) least = std::min(least, distance_[v]);
  nearest_ = least == kFar ? kFar : cost_of(least);
  return least < kFar;
}

std::int64_t MinCostFlow::push(int vertex, std::int64_t limit, std::vector<std::int64_t>& excess) {
  if (excess[vertex] < 0 && cost_of(distance_[vertex]) == nearest_) {
    const std::int64_t taken = std::min(limit, -excess[vertex]);
    excess[vertex] += taken;
    return taken;
  }
  std::int64_t sent = 0;
  for (int& a = pointer_[vertex]; a >= 0; a = next_[a]) {
    if (room_[a] == 0 || distance_[to_[a]] != distance_[vertex] + cost_[a] * kHop + 1) continue;
    const std::int64_t moved = push(to_[a], std::min(limit - sent, room_[a]), excess);
    room_[a] -= moved;
    room_[a ^ 1] += moved;
    sent += moved;
    if (sent == limit) break;
  }
  return sent;
}

bool MinCostFlow::settle(std::vector<std::int64_t>& excess) {
  const auto left = [&] { return std::any_of(excess.begin(), excess.end(), [](auto x) { return x > 0; }); };
  while (left()) {
    if (!distances(excess)) return false;
    pointer_ = head_;
    for (int v = 0; v < static_cast<int>(head_.size()); ++v)
      if (excess[v] > 0 && distance_[v] == 0) excess[v] -= push(v, excess[v], excess);
  }
  return true;
}

}  // namespace hecate
