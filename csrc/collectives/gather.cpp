// SparseAllGather: every piece is sent down a tree over nodes, and within each node down a tree over the holders.
// Different pieces start their trees at different devices, so that all devices send and all network ports are used.
#include <algorithm>

#include "collectives/route.hpp"

namespace hecate {

std::vector<int> Request::holders(int expert, int node, int except) const {
  std::vector<int> found;
  for (int d = node * devices_per_node; d < (node + 1) * devices_per_node; ++d)
    if (d != except && held(expert, d)) found.push_back(d);
  return found;
}

namespace {

// Builds the hops of one piece of one expert.
class PieceTree {
 public:
  PieceTree(const Request& request, const Travel& shape, int expert, int piece, std::vector<Hop>& hops)
      : request_(request), shape_(shape), expert_(expert), piece_(piece), hops_(hops) {}

  void build() {
    const int owner = static_cast<int>(request_.owner[expert_]), home = request_.node_of(owner);
    std::vector<Stop> exits{{owner, -1}};
    std::vector<int> near = rotated(request_.holders(expert_, home, owner));
    if (!near.empty()) {
      std::vector<Stop> reached;
      if (shape_.inside == kBinomial) {
        near.insert(near.begin(), owner);
        reached = down(exits[0], near);
        reached.erase(reached.begin());
      } else {
        reached = down({near[0], hop(exits[0], near[0])}, near);
      }
      if (shape_.spread) exits.insert(exits.end(), reached.begin(), reached.end());
    }
    std::vector<Stop> entries;
    for (int node = 0; node < request_.nodes(); ++node) {
      const std::vector<int> there = node == home ? std::vector<int>{} : rotated(request_.holders(expert_, node));
      if (there.empty()) continue;
      const int i = static_cast<int>(entries.size()), parent = i / shape_.across;
      const Stop from = parent == 0 ? exits[(piece_ + i) % exits.size()] : entries[parent - 1];
      entries.push_back({there[0], hop(from, there[0])});
      down(entries.back(), there);
    }
  }

 private:
  struct Stop {
    int device, hop;  // the device, and the hop that brought the piece to it; -1 at the owner
  };

  std::vector<int> rotated(std::vector<int> devices) const {
    if (!devices.empty())
      std::rotate(devices.begin(), devices.begin() + (piece_ + expert_) % devices.size(), devices.end());
    return devices;
  }

  int hop(Stop from, int to) {
    Hop h{expert_, piece_, shape_.pieces, from.device, to};
    if (from.hop >= 0) h.after.push_back(from.hop);
    hops_.push_back(std::move(h));
    return static_cast<int>(hops_.size()) - 1;
  }

  std::vector<Stop> down(Stop root, const std::vector<int>& devices) {
    std::vector<Stop> reached{root};
    for (int i = 1; i < static_cast<int>(devices.size()); ++i)
      reached.push_back({devices[i], hop(reached[parent(i)], devices[i])});
    return reached;
  }

  int parent(int i) const {
    if (shape_.inside != kBinomial) return (i - 1) / shape_.inside;
    int highest = 1;
    while (2 * highest <= i) highest *= 2;
    return i - highest;
  }

  const Request& request_;
  const Travel shape_;
  const int expert_, piece_;
  std::vector<Hop>& hops_;
};

int fan_out(const Request& request, int expert) {
  int holders = 0;
  for (int d = 0; d < request.devices; ++d) holders += d != request.owner[expert] && request.held(expert, d);
  return holders;
}

}  // namespace

std::vector<Hop> gather_hops(const Request& request, const Travel& shape) {
  std::vector<Hop> hops;
  for (int piece = 0; piece < shape.pieces; ++piece)
    for (int e = 0; e < request.experts; ++e) {
      const int copies = fan_out(request, e);
      if (copies > 1 && !shape.direct) {
        PieceTree(request, shape, e, piece, hops).build();
      } else if (piece == 0) {
        for (int d = 0; d < request.devices; ++d)
          if (d != request.owner[e] && request.held(e, d)) hops.push_back({e, 0, 1, static_cast<int>(request.owner[e]), d});
      }
    }
  return hops;
}

}  // namespace hecate
