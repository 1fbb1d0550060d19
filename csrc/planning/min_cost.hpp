// Minimum-cost flow by successive shortest paths, for small integer values.
#pragma once

#include <cstdint>
#include <vector>

namespace hecate {

class MinCostFlow {
 public:
  explicit MinCostFlow(int vertices, int expected_edges = 0);

  // Adds an edge that carries `amount` already, without an upper limit. Each of the first `valued` units on it gains
  // `worth` > 0, further ones nothing. All edges are added before `settle`. Returns the edge's index.
  int add_edge(int from, int to, std::int64_t amount, std::int64_t valued, int worth);
  std::int64_t amount(int edge) const { return edges_[edge].amount; }

  // Moves every unit of excess[v] > 0 to vertices with excess < 0 at the least loss of value. The amounts so far must
  // have the greatest value. Returns false if some excess cannot be moved.
  bool settle(std::vector<std::int64_t>& excess);

 private:
  struct Edge {
    std::int64_t amount, valued;
    int from, to, worth;
    int forward, backward;  // its arcs
  };
  // One direction of an edge, as long as its next unit loses the same value.
  struct Arc {
    std::int64_t room, length;
    int to, edge;
  };

  void sort_arcs();
  void refresh(const Edge& edge);
  bool distances(const std::vector<std::int64_t>& excess);
  bool levels(const std::vector<std::int64_t>& excess);
  void push_all(std::vector<std::int64_t>& excess);
  std::int64_t push(int vertex, std::int64_t limit, std::vector<std::int64_t>& excess);
  int vertices() const { return static_cast<int>(distance_.size()); }

  std::vector<Edge> edges_;
  std::vector<Arc> arcs_;  // those of a vertex side by side, those of edges added last first
  std::vector<int> first_, pointer_, queue_;
  std::vector<std::int64_t> distance_, cost_;
  std::vector<char> queued_;
  std::int64_t nearest_ = 0;
};

}  // namespace hecate
