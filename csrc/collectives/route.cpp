// Chooses the shape of a route that the simulation finds fastest.
#include "collectives/route.hpp"

#include <algorithm>
#include <numeric>

namespace hecate {

namespace {

constexpr std::int64_t kLeastPiece = 64 * 1024;  // bytes
constexpr int kMostPieces = 64;

using Hops = std::vector<Hop> (*)(const Request&, const Travel&);
using Rounds = std::vector<int> (*)(const Request&, const std::vector<Hop>&, const Timing&, const std::vector<int>&);

class Choice {
 public:
  Choice(const Request& request, Hops hops) : request_(request), hops_of_(hops) {
    consider(Travel{});
    direct_ns_ = timing_.total;
  }

  // Keep `shape` if it is 2 % faster than the best so far, or 5 % if it has more hops, since hops have costs that the
  // model does not know. Returns how long it takes.
  std::int64_t consider(const Travel& shape) {
    std::vector<Hop> hops = hops_of_(request_, shape);
    Timing timing = simulate(request_, hops);
    const std::int64_t total = timing.total, margin = timing_.total / (hops.size() > hops_.size() ? 20 : 50);
    if (hops_.empty() || total < timing_.total - margin)
      shape_ = shape, hops_ = std::move(hops), timing_ = std::move(timing);
    return total;
  }

  // Try every shape, and double its number of pieces as long as that saves 1 %.
  void search(const std::vector<Travel>& shapes) {
    const std::int64_t most = std::min<std::int64_t>(kMostPieces, request_.chunk_bytes / kLeastPiece);
    for (Travel shape : shapes) {
      std::int64_t least = consider(shape), before;
      do {
        before = least;
        shape.pieces *= 2;
        if (shape.pieces <= most) least = std::min(least, consider(shape));
      } while (least < before - before / 100);
    }
  }

  Route route(Rounds rounds) const;

 private:
  const Request& request_;
  const Hops hops_of_;
  Travel shape_;
  std::vector<Hop> hops_;
  Timing timing_;
  std::int64_t direct_ns_ = 0;
};

Route Choice::route(Rounds rounds) const {
  std::vector<int> order(hops_.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return timing_.start[a] < timing_.start[b]; });
  const std::vector<int> round = rounds(request_, hops_, timing_, order);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return round[a] < round[b]; });
  Route result;
  result.shape = shape_;
  for (int i : order) {
    result.hops.push_back(hops_[i]);
    result.round.push_back(round[i]);
  }
  result.predicted_ns = timing_.total;
  result.direct_ns = direct_ns_;
  result.bound_ns = bound_ns(request_);
  return result;
}

}  // namespace

Route gather_route(const Request& request) {
  Choice choice(request, gather_hops);
  const bool nodes = request.nodes() > 2, ports = request.nodes() > 1 && request.links.crossing < request.links.border;
  std::vector<Travel> shapes;
  for (int across : {kAll, 1, 2})
    for (int inside : {kAll, 1, 2, kBinomial}) {
      if (!nodes && across != kAll) continue;
      shapes.push_back({false, 1, inside, across, false});
      if (ports) shapes.push_back({false, 1, inside, across, true});
    }
  choice.search(shapes);
  return choice.route(gather_rounds);
}

Route reduce_route(const Request& request) {
  Choice choice(request, reduce_hops);
  std::vector<Travel> shapes;
  for (int inside : {1, kAll})
    for (int across : {kAll, 1})
      if (across == kAll || request.nodes() > 2) shapes.push_back({false, 1, inside, across, false});
  choice.search(shapes);
  return choice.route(reduce_rounds);
}

}  // namespace hecate
