// SparseReduceScatter: the contributions of a node are added in ascending order, either along a chain or by one device
// per piece; the nodes' sums are added in ascending order, either along a chain over nodes or by the owner.
#include <algorithm>

#include "collectives/route.hpp"

namespace hecate {

namespace {

// Builds the hops of one piece of one expert after the other.
class PieceSums {
 public:
  PieceSums(const Request& request, const Groups& groups, std::vector<Hop>& hops)
      : request_(request), groups_(groups), hops_(hops), came_(2 * static_cast<std::size_t>(request.devices), -1) {}

  void build(const Travel& shape, int expert, int piece) {
    shape_ = shape, expert_ = expert, piece_ = piece, owner_ = static_cast<int>(request_.owner[expert]);
    const int groups = groups_.groups(expert);
    if (groups == 0) return;
    last_node_ = groups_.of(expert, groups - 1).node;
    const std::size_t first = hops_.size();
    Sum total{-1, -1, false};
    for (int g = 0; g < groups; ++g) {
      const Groups::Group there = groups_.of(expert, g);
      if (shape_.across == 1) {
        total = add_node(there, total);
      } else if (sends_raw(there)) {
        for (int i = 0; i < there.size; ++i) to_owner({there.devices[i], there.devices[i], false});
      } else {
        to_owner(add_node(there, {-1, -1, false}));
      }
    }
    if (shape_.across == 1) to_owner(total);
    const int last = came(owner_, true);
    if (last >= 0 && hops_[last].behind < 0 && !request_.held(expert_, owner_)) hops_[last].alone = true;
    for (std::size_t i = first; i < hops_.size(); ++i) came(hops_[i].dst, hops_[i].final) = -1;
  }

 private:
  // The sum that `device` holds: of the contributions from device `first` on.
  struct Sum {
    int device, first;
    bool partial;
  };

  // Sending one partial sum instead of several contributions pays only if it has fewer bytes.
  bool sends_raw(const Groups::Group& there) const {
    const std::int64_t others = there.size - std::count(there.devices, there.devices + there.size, owner_);
    return shape_.direct || others <= 1 || others * request_.chunk_bytes <= request_.partial_bytes;
  }

  // The device that the contributions of a node are added on.
  int adder(const Groups::Group& there) const {
    return shape_.inside == 1 ? there.devices[there.size - 1] : there.at(0, piece_ + expert_);
  }

  // Adds the node's contributions on one of its devices to `before`, the sum of the nodes with lower numbers.
  Sum add_node(const Groups::Group& there, Sum before) {
    const bool chain = shape_.inside == 1;
    const int at = adder(there), lowest = there.devices[0];
    // The receiver adds in order of arrival, so the sum of the lower nodes must arrive first.
    if (before.device >= 0) hop(before, at, ends_at(at, there));
    Sum sum{lowest, lowest, false};
    for (int i = 0; i + chain < there.size; ++i) {
      const int to = chain ? there.devices[i + 1] : at;
      if (!chain) sum = {there.devices[i], there.devices[i], false};
      if (sum.device != to) hop(sum, to, ends_at(to, there));
      if (chain) sum = {to, lowest, true};
    }
    return {at, before.device >= 0 ? before.first : lowest, there.size > 1 || before.device >= 0};
  }

  // Whether a piece that arrives at `device` stays there, because it is the owner and sends nothing on.
  bool ends_at(int device, const Groups::Group& there) const {
    return device == owner_ && device == adder(there) && (shape_.across != 1 || request_.node_of(device) == last_node_);
  }

  void to_owner(Sum sum) {
    if (sum.device != owner_) hop(sum, owner_, true);
  }

  void hop(Sum sum, int to, bool final) {
    int& last = came(to, final);
    hops_.push_back({expert_, piece_, shape_.pieces, sum.device, to, sum.first, sum.partial, final, false,
                     came(sum.device, false), last});
    last = static_cast<int>(hops_.size()) - 1;
  }

  int& came(int device, bool final) { return came_[2 * static_cast<std::size_t>(device) + final]; }

  const Request& request_;
  const Groups& groups_;
  std::vector<Hop>& hops_;
  Travel shape_;
  int expert_ = 0, piece_ = 0, owner_ = 0, last_node_ = 0;
  std::vector<int> came_;  // [devices, final]: the last hop that brings this piece there, or -1
};

}  // namespace

void reduce_hops(const Request& request, const Groups& groups, const Travel& shape, std::vector<Hop>& hops) {
  hops.clear();
  PieceSums sums(request, groups, hops);
  Travel whole = shape;
  whole.pieces = 1, whole.direct = true, whole.across = kAll;
  for (int piece = 0; piece < shape.pieces; ++piece)
    for (int e = 0; e < request.experts; ++e) {
      const bool handed_on = !shape.direct && groups.others(e) > 1;
      if (handed_on || piece == 0) sums.build(handed_on ? shape : whole, e, piece);
    }
}

}  // namespace hecate
