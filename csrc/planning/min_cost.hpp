// Minimum-cost flow by successive shortest paths, for small integer costs.
#pragma once

#include <cstdint>
#include <vector>

namespace hecate {

class MinCostFlow {
 public:
  explicit MinCostFlow(int vertices, int expected_arcs = 0);

  // Adds an arc that already carries `flow` of its `capacity`, and its reverse. Returns the arc's index; the reverse
  // arc has index + 1.
  int add_arc(int from, int to, std::int64_t capacity, std::int64_t flow, int cost);
  std::int64_t flow(int arc) const { return room_[arc + 1]; }

  // Moves every unit of excess[v] > 0 to vertices with excess < 0 at the least total cost. The flow so far must itself
  // have least cost. Returns false if some excess cannot be moved.
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
