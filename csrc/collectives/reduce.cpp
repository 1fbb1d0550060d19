// SparseReduceScatter: the contributions of a node are added in ascending order, either along a chain or by one device
// per piece; the nodes' sums are added in ascending order, either along a chain over nodes or by the owner.
#include <algorithm>
#include <map>

#include "collectives/route.hpp"

namespace hecate {

namespace {

class PieceSum {
 public:
  PieceSum(const Request& request, const Travel& shape, int expert, int piece, std::vector<Hop>& hops)
      : request_(request), shape_(shape), expert_(expert), piece_(piece), owner_(static_cast<int>(request.owner[expert])),
        hops_(hops) {}

  void build() {
    Sum total{-1, -1, false};
    for (int node = 0; node < request_.nodes(); ++node) {
      const std::vector<int> there = request_.holders(expert_, node);
      if (there.empty()) continue;
      if (shape_.across == 1) {
        total = add_node(there, total);
      } else if (sends_raw(there)) {
        for (int d : there) to_owner({d, d, false});
      } else {
        to_owner(add_node(there, {-1, -1, false}));
      }
    }
    if (shape_.across == 1) to_owner(total);
    const std::vector<int>& last = came_[{owner_, true}];
    if (last.size() == 1 && !request_.held(expert_, owner_)) hops_[last[0]].alone = true;
  }

 private:
  // The sum that `device` holds: of the contributions from device `first` on.
  struct Sum {
    int device, first;
    bool partial;
  };

  // Sending one partial sum instead of several contributions pays only if it has fewer bytes.
  bool sends_raw(const std::vector<int>& there) const {
    const std::int64_t others = static_cast<std::int64_t>(there.size()) - std::count(there.begin(), there.end(), owner_);
    return shape_.direct || others <= 1 || others * request_.chunk_bytes <= request_.partial_bytes;
  }

  // Adds the node's contributions on one of its devices to `before`, the sum of the nodes with lower numbers.
  Sum add_node(const std::vector<int>& there, Sum before) {
    const bool chain = shape_.inside == 1;
    const int at = chain ? there.back() : there[(piece_ + expert_) % there.size()];
    // The receiver adds in order of arrival, so the sum of the lower nodes must arrive first.
    if (before.device >= 0) hop(before, at, ends_at(at, there));
    Sum sum{there[0], there[0], false};
    for (std::size_t i = 0; i + chain < there.size(); ++i) {
      const int to = chain ? there[i + 1] : at;
      if (!chain) sum = {there[i], there[i], false};
      if (sum.device != to) hop(sum, to, ends_at(to, there));
      if (chain) sum = {to, there[0], true};
    }
    const int first = before.device >= 0 ? before.first : there[0];
    return {at, first, there.size() > 1 || before.device >= 0};
  }

  // Whether a piece that arrives at `device` stays there, because it is the owner and sends nothing on.
  bool ends_at(int device, const std::vector<int>& there) const {
    if (device != owner_) return false;
    const bool last_node = request_.node_of(device) == last_node_;
    const int at = shape_.inside == 1 ? there.back() : there[(piece_ + expert_) % there.size()];
    return device == at && (shape_.across != 1 || last_node);
  }

  void to_owner(Sum sum) {
    if (sum.device != owner_) hop(sum, owner_, true);
  }

  void hop(Sum sum, int to, bool final) {
    Hop h{expert_, piece_, shape_.pieces, sum.device, to, sum.first, sum.partial, final, false, {}, -1};
    h.after = came_[{sum.device, false}];
    std::vector<int>& there = came_[{to, final}];
    if (!there.empty()) h.behind = there.back();
    there.push_back(static_cast<int>(hops_.size()));
    hops_.push_back(std::move(h));
  }

  int last_node() const {
    int last = -1;
    for (int node = 0; node < request_.nodes(); ++node)
      if (!request_.holders(expert_, node).empty()) last = node;
    return last;
  }

  const Request& request_;
  const Travel shape_;
  const int expert_, piece_, owner_;
  std::vector<Hop>& hops_;
  const int last_node_ = last_node();
  std::map<std::pair<int, bool>, std::vector<int>> came_;  // (device, final) -> hops that arrive there
};

int contributors_elsewhere(const Request& request, int expert) {
  int others = 0;
  for (int d = 0; d < request.devices; ++d) others += d != request.owner[expert] && request.held(expert, d);
  return others;
}

}  // namespace

std::vector<Hop> reduce_hops(const Request& request, const Travel& shape) {
  std::vector<Hop> hops;
  Travel whole = shape;
  whole.pieces = 1, whole.direct = true, whole.across = kAll;
  for (int piece = 0; piece < shape.pieces; ++piece)
    for (int e = 0; e < request.experts; ++e) {
      const bool handed_on = !shape.direct && contributors_elsewhere(request, e) > 1;
      if (handed_on || piece == 0) PieceSum(request, handed_on ? shape : whole, e, piece, hops).build();
    }
  return hops;
}

}  // namespace hecate
