// Minimum-cost flow by successive shortest paths, for small integer costs.
#pragma once

#include <cstdint>
#include <vector>

namespace hecate {

class MinCostFlow {
 public:
  explicit MinCostFlow(int vertices, int expected_arcs = 0);

  // An arc and its reverse; `flow` of `capacity` is in use. Returns its index; the reverse has index + 1.
  int add_arc(int from, int to, std::int64_t capacity, std::int64_t flow, int cost);
  std::int64_t flow(int arc) const { return room_[arc + 1]; }

  // Moves every unit of excess[v] > 0 to vertices with excess < 0 at the least cost. The flow in use must be of
  // least cost itself. False if some excess cannot be moved.
  bool settle(std::vector<std::int64_t>& excess);

 private:
  bool distances(const std::vector<std::int64_t>& excess);
  std::int64_t push(int vertex, std::int64_t limit, std::vector<std::int64_t>& excess);

  std::vector<int> head_, next_, to_, cost_, pointer_;
  std::vector<std::int64_t> room_, distance_;
  std::vector<int> queue_;
  std::vector<char> queued_;
  std::int64_t nearest_ = 0;
};

}  // namespace hecate
