#include "planning/min_cost.hpp"

#include <algorithm>
#include <limits>

namespace hecate {

namespace {
constexpr std::int64_t kFar = std::numeric_limits<std::int64_t>::max() / 4;
// An arc's length is cost * kHop + 1, so that of all least-cost paths those with the fewest arcs are shortest. Hence
// the admissible arcs form no cycle.
constexpr std::int64_t kHop = std::int64_t{1} << 20;

// The part of a sum of at most kHop - 1 lengths that comes from costs, times kHop; rounds down, also if it is negative.
std::int64_t cost_of(std::int64_t length) { return length & ~(kHop - 1); }
}  // namespace

MinCostFlow::MinCostFlow(int vertices, int expected_edges)
    : first_(vertices + 1, 0), distance_(vertices, kFar), cost_(vertices), queued_(vertices, 0) {
  edges_.reserve(expected_edges);
}

int MinCostFlow::add_edge(int from, int to, std::int64_t amount, std::int64_t valued, int worth) {
  edges_.push_back({amount, valued, from, to, worth, 0, 0});
  return static_cast<int>(edges_.size()) - 1;
}

void MinCostFlow::sort_arcs() {
  for (const Edge& edge : edges_) ++first_[edge.from + 1], ++first_[edge.to + 1];
  for (int v = 0; v < vertices(); ++v) first_[v + 1] += first_[v];
  arcs_.resize(2 * edges_.size());
  std::vector<int> next(first_.begin(), first_.end() - 1);
  for (int e = static_cast<int>(edges_.size()) - 1; e >= 0; --e) {
    Edge& edge = edges_[e];
    edge.forward = next[edge.from]++;
    edge.backward = next[edge.to]++;
    arcs_[edge.forward].to = edge.to;
    arcs_[edge.backward].to = edge.from;
    arcs_[edge.forward].edge = arcs_[edge.backward].edge = e;
    refresh(edge);
  }
}

void MinCostFlow::refresh(const Edge& edge) {
  Arc& forward = arcs_[edge.forward];
  Arc& backward = arcs_[edge.backward];
  const std::int64_t left = edge.valued - edge.amount;  // valued units that the edge does not carry
  forward.room = left > 0 ? left : kFar;
  forward.length = (left > 0 ? -edge.worth : 0) * kHop + 1;
  backward.room = left < 0 ? -left : edge.amount;
  backward.length = (left < 0 ? 0 : edge.worth) * kHop + 1;
}

// Shortest paths from all vertices with excess, by label correcting (Bellman-Ford with a queue).
bool MinCostFlow::distances(const std::vector<std::int64_t>& excess) {
  std::fill(distance_.begin(), distance_.end(), kFar);
  queue_.clear();
  for (int v = 0; v < vertices(); ++v)
    if (excess[v] > 0) distance_[v] = 0, queue_.push_back(v), queued_[v] = 1;
  for (std::size_t at = 0; at < queue_.size(); ++at) {
    const int v = queue_[at];
    queued_[v] = 0;
    for (int a = first_[v]; a < first_[v + 1]; ++a) {
      const Arc& arc = arcs_[a];
      const std::int64_t length = distance_[v] + arc.length;
      if (arc.room == 0 || length >= distance_[arc.to]) continue;
      distance_[arc.to] = length;
      if (!queued_[arc.to]) queued_[arc.to] = 1, queue_.push_back(arc.to);
    }
  }
  nearest_ = kFar;
  for (int v = 0; v < vertices(); ++v) {
    cost_[v] = distance_[v] < kFar ? cost_of(distance_[v]) : kFar;
    if (excess[v] < 0) nearest_ = std::min(nearest_, cost_[v]);
  }
  return nearest_ < kFar;
}

// The same distances after flow has moved along shortest paths, where costs have not changed: breadth-first search over
// arcs of reduced cost zero. All paths of cost `nearest_` consist of such arcs. Returns false if there is none.
bool MinCostFlow::levels(const std::vector<std::int64_t>& excess) {
  std::fill(distance_.begin(), distance_.end(), kFar);
  queue_.clear();
  bool found = false;
  for (int v = 0; v < vertices(); ++v)
    if (excess[v] > 0 && cost_[v] == 0) distance_[v] = 0, queue_.push_back(v);
  for (std::size_t at = 0; at < queue_.size(); ++at) {
    const int v = queue_[at];
    found |= excess[v] < 0 && cost_[v] == nearest_;
    for (int a = first_[v]; a < first_[v + 1]; ++a) {
      const Arc& arc = arcs_[a];
      if (distance_[arc.to] < kFar || arc.room == 0 || cost_[v] + arc.length - 1 != cost_[arc.to]) continue;
      distance_[arc.to] = distance_[v] + arc.length;
      queue_.push_back(arc.to);
    }
  }
  return found;
}

std::int64_t MinCostFlow::push(int vertex, std::int64_t limit, std::vector<std::int64_t>& excess) {
  if (excess[vertex] < 0 && cost_of(distance_[vertex]) == nearest_) {
    const std::int64_t taken = std::min(limit, -excess[vertex]);
    excess[vertex] += taken;
    return taken;
  }
  std::int64_t sent = 0;
  for (int& a = pointer_[vertex]; a < first_[vertex + 1]; ++a) {
    const Arc& arc = arcs_[a];
    if (arc.room == 0 || distance_[arc.to] != distance_[vertex] + arc.length) continue;
    const std::int64_t moved = push(arc.to, std::min(limit - sent, arc.room), excess);
    if (moved == 0) continue;
    Edge& edge = edges_[arc.edge];
    edge.amount += a == edge.forward ? moved : -moved;
    refresh(edge);
    sent += moved;
    if (sent == limit) break;
  }
  return sent;
}

void MinCostFlow::push_all(std::vector<std::int64_t>& excess) {
  pointer_.assign(first_.begin(), first_.end() - 1);
  for (int v = 0; v < vertices(); ++v)
    if (excess[v] > 0 && distance_[v] == 0) excess[v] -= push(v, excess[v], excess);
}

bool MinCostFlow::settle(std::vector<std::int64_t>& excess) {
  const auto left = [&] { return std::any_of(excess.begin(), excess.end(), [](auto x) { return x > 0; }); };
  sort_arcs();
  while (left()) {
    if (!distances(excess)) return false;
    do push_all(excess);
    while (levels(excess));
  }
  return true;
}

}  // namespace hecate
