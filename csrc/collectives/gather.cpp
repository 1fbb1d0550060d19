// SparseAllGather: every piece is sent down a tree over nodes, and within each node down a tree over the holders.
// Different pieces start their trees at different devices, so that all devices send and all network ports are used.
#include <algorithm>

#include "collectives/route.hpp"
#include "for_each_true.hpp"

namespace hecate {

Groups::Groups(const Request& request, bool with_owner) : begin_{0}, first_{0}, others_(request.experts, 0) {
  for (int e = 0; e < request.experts; ++e) {
    int last = -1;
    for_each_true(request.holds + static_cast<std::size_t>(e) * request.devices, request.devices, [&](int d) {
      const bool owns = d == request.owner[e];
      others_[e] += !owns;
      if (owns && !with_owner) return;
      if (request.node_of(d) != last) {
        last = request.node_of(d);
        node_.push_back(last);
        begin_.push_back(begin_.back());
      }
      device_.push_back(d);
      ++begin_.back();
    });
    first_.push_back(static_cast<int>(node_.size()));
  }
}

namespace {

// Builds the hops of one piece of one expert after the other.
class PieceTrees {
 public:
  PieceTrees(const Request& request, const Groups& groups, const Travel& shape, std::vector<Hop>& hops)
      : request_(request), groups_(groups), shape_(shape), hops_(hops) {}

  void build(int expert, int piece) {
    expert_ = expert, piece_ = piece, shift_ = piece + expert;
    const int owner = static_cast<int>(request_.owner[expert]), home = request_.node_of(owner);
    exits_.assign(1, {owner, -1});
    for (int g = 0; g < groups_.groups(expert); ++g)
      if (groups_.of(expert, g).node == home) inside_home(groups_.of(expert, g));
    entries_.clear();
    for (int g = 0; g < groups_.groups(expert); ++g) {
      const Groups::Group there = groups_.of(expert, g);
      if (there.node == home) continue;
      const int i = static_cast<int>(entries_.size()), parent = i / shape_.across;
      const Stop from = parent == 0 ? exits_[(piece_ + i) % exits_.size()] : entries_[parent - 1];
      entries_.push_back({there.at(0, shift_), hop(from, there.at(0, shift_))});
      reached_.assign(1, entries_.back());
      down(there, 1);
    }
  }

 private:
  struct Stop {
    int device, hop;  // the device, and the hop that brought the piece to it; -1 at the owner
  };

  // A binomial tree has the owner as its root; other trees have the first holder, which the owner sends to.
  void inside_home(const Groups::Group& near) {
    const bool from_owner = shape_.inside == kBinomial;
    reached_.assign(1, from_owner ? exits_[0] : Stop{near.at(0, shift_), hop(exits_[0], near.at(0, shift_))});
    down(near, from_owner ? 0 : 1);
    if (shape_.spread) exits_.insert(exits_.end(), reached_.begin() + from_owner, reached_.end());
  }

  // Sends the piece to the devices of the group from number `next` on; the root of the tree has been reached.
  void down(const Groups::Group& group, int next) {
    for (; next < group.size; ++next) {
      const Stop from = reached_[parent(static_cast<int>(reached_.size()))];
      reached_.push_back({group.at(next, shift_), hop(from, group.at(next, shift_))});
    }
  }

  int hop(Stop from, int to) {
    Hop h{expert_, piece_, shape_.pieces, from.device, to};
    h.after = from.hop;
    hops_.push_back(h);
    return static_cast<int>(hops_.size()) - 1;
  }

  int parent(int i) const {
    if (shape_.inside != kBinomial) return (i - 1) / shape_.inside;
    int highest = 1;
    while (2 * highest <= i) highest *= 2;
    return i - highest;
  }

  const Request& request_;
  const Groups& groups_;
  const Travel shape_;
  std::vector<Hop>& hops_;
  int expert_ = 0, piece_ = 0, shift_ = 0;
  std::vector<Stop> exits_, entries_, reached_;
};

}  // namespace

void gather_hops(const Request& request, const Groups& groups, const Travel& shape, std::vector<Hop>& hops) {
  hops.clear();
  PieceTrees trees(request, groups, shape, hops);
  for (int piece = 0; piece < shape.pieces; ++piece)
    for (int e = 0; e < request.experts; ++e) {
      if (groups.others(e) > 1 && !shape.direct) {
        trees.build(e, piece);
      } else if (piece == 0) {
        for (int g = 0; g < groups.groups(e); ++g)
          for (int i = 0; i < groups.of(e, g).size; ++i)
            hops.push_back({e, 0, 1, static_cast<int>(request.owner[e]), groups.of(e, g).devices[i]});
      }
    }
}

}  // namespace hecate
