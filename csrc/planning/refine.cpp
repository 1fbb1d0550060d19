#include "planning/refine.hpp"

#include <algorithm>
#include <numeric>

namespace hecate {

namespace {

constexpr int kProposals = 8;  // per trial: most proposals that are not worth a trial

// splitmix64: a random number generator that makes the same proposals on every rank.
class Random {
 public:
  std::int64_t below(std::int64_t end) {
    std::uint64_t z = state_ += 0x9E3779B97F4A7C15;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
    return static_cast<std::int64_t>((z ^ (z >> 31)) % static_cast<std::uint64_t>(end));
  }

 private:
  std::uint64_t state_ = 0;
};

class Search {
 public:
  Search(Ensemble& ensemble, Holding& holding, int fixed, const Limits& limits)
      : ensemble_(ensemble), holding_(holding), limits_(limits), fixed_(fixed), copies_(holding.pairs() - fixed),
        largest_(ensemble.guesses.size()), saved_(ensemble.guesses.size()) {
    sends_limited_ = *std::min_element(limits.out.begin(), limits.out.end()) < copies_;
  }

  void run(int trials) {
    ensemble_.balance(holding_, kBalanced);
    for (std::size_t k = 0; k < largest_.size(); ++k) {
      Guess& guess = ensemble_.guesses[k];
      largest_[k] = guess.flow.min_max(holding_, guess.target);
      settle(k);
    }
    for (int proposals = kProposals * trials; trials > 0 && proposals > 0 && weigh(); --proposals) {
      const std::int64_t pick = random_.below(below_.back());
      const int expert = static_cast<int>(std::upper_bound(below_.begin(), below_.end(), pick) - below_.begin());
      const int pair = fixed_ + static_cast<int>(random_.below(copies_));
      if (!helps(expert, holding_.device_of[pair]) || !fits(pair, expert)) continue;
      --trials;
      try_expert(pair, expert);
    }
  }

 private:
  struct Saved {
    Tokens amount, load;
    std::int64_t largest;
  };

  std::int64_t slack(std::size_t k) const { return largest_[k] - ensemble_.guesses[k].target; }

  // Finds what keeps a guess from being balanced better.
  void settle(std::size_t k) {
    Guess& guess = ensemble_.guesses[k];
    if (slack(k) > 0) guess.flow.drain(holding_, largest_[k] - 1);
    guess.refresh(holding_);
    changed_ = true;
  }

  // Weighs experts by what copies of them could take from overloaded devices; false if there is nothing to take.
  bool weigh() {
    if (!changed_) return below_.back() > 0;
    changed_ = false;
    order_.clear();
    for (bool balanced : {false, true})
      for (std::size_t k = 0; k < largest_.size(); ++k)
        if ((slack(k) == 0) == balanced) order_.push_back(k);
    below_.assign(holding_.experts(), 0);
    for (std::size_t k = 0; k < largest_.size(); ++k)
      if (slack(k) > 0)
        for (int e = 0; e < holding_.experts(); ++e) below_[e] += ensemble_.guesses[k].relief[e];
    std::partial_sum(below_.begin(), below_.end(), below_.begin());
    return below_.back() > 0;
  }

  bool helps(int expert, int device) const {
    for (std::size_t k = 0; k < largest_.size(); ++k)
      if (slack(k) > 0 && ensemble_.guesses[k].helped_by(expert, device)) return true;
    return false;
  }

  // Whether the limits allow the copies, with `expert` for copy `pair`, to be made one after the other.
  bool fits(int pair, int expert) const {
    const int device = holding_.device_of[pair];
    if (holding_.holds(expert, device)) return false;
    if (limits_.allowed && !limits_.allowed[std::int64_t{expert} * holding_.devices() + device]) return false;
    if (!sends_limited_) return true;
    Limits left = limits_;
    Holding made(holding_.experts(), holding_.devices(), holding_.pairs());
    for (int p = 0; p < holding_.pairs(); ++p) {
      const int e = p == pair ? expert : holding_.expert_of[p];
      if (p >= fixed_) {
        if (!left.can_send(made, e)) return false;
        left.take(made, e, holding_.device_of[p]);
      }
      made.add_pair(e, holding_.device_of[p]);
    }
    return true;
  }

  // Gives the slot of copy `pair` to another expert; takes it back if that raises the sum of the largest loads.
  void try_expert(int pair, int expert) {
    const int before = holding_.expert_of[pair];
    holding_.change_expert(pair, expert);
    std::int64_t change = 0, left = 0;  // by how much the guesses that are still to come could lower the sum
    for (std::size_t k = 0; k < largest_.size(); ++k) left += slack(k);
    touched_.clear();
    for (std::size_t k : order_) {
      const bool same = slack(k) == 0 && ensemble_.guesses[k].flow.amount[pair] == 0;
      if (same) continue;
      left -= slack(k);
      change += rebalance(k, pair, before);
      if (change > left) return undo(pair, before);
    }
    for (std::size_t k : touched_) settle(k);
  }

  // The tokens of the replaced copy go back to the owner of its expert. Returns the change of the largest load.
  std::int64_t rebalance(std::size_t k, int pair, int before) {
    Flow& flow = ensemble_.guesses[k].flow;
    touched_.push_back(k);
    saved_[k].amount = flow.amount;
    saved_[k].load = flow.load;
    const std::int64_t old = saved_[k].largest = largest_[k], moved = flow.amount[pair];
    flow.add_amount(holding_, pair, -moved);
    flow.add_amount(holding_, before, moved);
    largest_[k] = flow.min_max(holding_, ensemble_.guesses[k].target);
    return largest_[k] - old;
  }

  void undo(int pair, int before) {
    holding_.change_expert(pair, before);
    for (std::size_t k : touched_) {
      Flow& flow = ensemble_.guesses[k].flow;
      flow.amount.swap(saved_[k].amount);
      flow.load.swap(saved_[k].load);
      largest_[k] = saved_[k].largest;
    }
  }

  Ensemble& ensemble_;
  Holding& holding_;
  const Limits& limits_;
  const int fixed_, copies_;
  bool sends_limited_, changed_ = true;
  Random random_;
  std::vector<std::int64_t> largest_;  // per guess: its smallest achievable largest load
  std::vector<Saved> saved_;           // per guess: its state before the trial
  std::vector<std::size_t> order_;     // guesses that are not balanced first: after them nothing can lower the sum
  std::vector<std::size_t> touched_;   // guesses that the trial has changed
  Tokens below_;                       // per expert: the sum of the weights up to it
};

}  // namespace

void refine(Ensemble& ensemble, Holding& holding, int fixed, const Limits& limits, int trials) {
  if (holding.pairs() > fixed) Search(ensemble, holding, fixed, limits).run(trials);
}

}  // namespace hecate
