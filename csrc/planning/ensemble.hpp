// Many guesses of the loads, balanced over the same copies, and what a further copy would take from overloaded devices.
#pragma once

#include <cstdint>
#include <vector>

#include "planning/network.hpp"

namespace hecate {

// Guesses of the loads, [levels, count, experts]: each level is more pessimistic; the first guess is the likeliest.
struct Guesses {
  const std::int64_t* loads;
  int levels, count, experts;
  const std::int64_t* of(int level, int guess) const {
    return loads + (static_cast<std::int64_t>(level) * count + guess) * experts;
  }
};

// A guess whose largest load is at most this, in 1/1000 of the mean, counts as balanced: the next loads will differ from
// it by more.
constexpr std::int64_t kBalanced = 1002;

// The flow of one guess, with a target for its largest device load. The other members are set by `Ensemble::refresh`.
struct Guess {
  Flow flow;
  std::int64_t target = 0;
  Tokens relief;           // per expert: tokens that a copy on an open device could take, at most the excess
  Tokens room;             // per device: target minus load, at least 0
  std::vector<char> open;  // per device: whether tokens of overloaded devices cannot get there so far

  bool helped_by(int expert, int device) const { return relief[expert] > 0 && open[device]; }
  void set_mean(std::int64_t permille);
  void refresh(const Holding& holding);
};

// The guesses of one level. Their flows share a `Holding`, which all calls must be given.
class Ensemble {
 public:
  // At first, the tokens of each expert are on its owner. The owner of expert e is pair number e.
  Ensemble(const Guesses& guesses, int level, const Holding& holding);

  // Balances every guess until no device has more than `permille` / 1000 times its mean load, if that can be reached.
  void balance(const Holding& holding, std::int64_t permille);
  // Accounts for a pair that was added to the holding.
  void add_pair(int device);
  // Accounts for pairs that hold another expert than `before`: their tokens go back to the owner of that.
  void follow(const Holding& holding, const std::vector<int>& before);
  // Balances the guesses that the newest pair of the holding helps.
  void balance_newest(const Holding& holding);
  // Per device of `devices`: tokens that a copy of `expert` there takes from overloaded ones, summed over all guesses.
  void values_of(int expert, const std::vector<int>& devices, Tokens& values) const;

  std::vector<Guess> guesses;
  Tokens relief, room;  // sums over the guesses

 private:
  void count(const Guess& guess, std::int64_t sign);
};

}  // namespace hecate
