// Copies for guessed loads, planned before the step: copies that other work hides cost nothing, so they are used for
// robustness.
#pragma once

#include <cstdint>
#include <vector>

#include "planning/limits.hpp"

namespace hecate {

// Guesses of the loads, [levels, count, experts]: each level is more pessimistic; the first guess is the likeliest.
struct Guesses {
  const std::int64_t* loads;
  int levels, count, experts;
  const std::int64_t* of(int level, int guess) const {
    return loads + (static_cast<std::int64_t>(level) * count + guess) * experts;
  }
};

// Copies in addition to `owners` that balance all guesses as well as the limits allow: first those that the likeliest
// guess needs; then those that take most load from overloaded devices over all guesses, while the target is tightened
// step by step; then a local search with at most `swaps` trials, each giving a slot to another expert. Returned in the
// order in which they were added.
std::vector<Pair> robust_copies(const Guesses& guesses, const std::vector<int>& owners, const Limits& limits, int swaps);

}  // namespace hecate
