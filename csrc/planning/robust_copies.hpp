// Copies for loads that are guessed: ahead of time, where hidden bytes are free and buy robustness.
#pragma once

#include <cstdint>
#include <vector>

#include "planning/limits.hpp"

namespace hecate {

// Guesses of the loads, [levels, count, experts]: each level is more pessimistic, the first guess the likeliest.
struct Guesses {
  const std::int64_t* loads;
  int levels, count, experts;
  const std::int64_t* of(int level, int guess) const {
    return loads + (static_cast<std::int64_t>(level) * count + guess) * experts;
  }
};

// Copies beyond `owners` that balance all guesses as well as the limits allow: first those that the likeliest guess
// needs, then what relieves most guesses, for a target that tightens, and at last at most `swaps` trials of giving a
// slot to another expert. Returns them in the order of their use.
std::vector<Pair> robust_copies(const Guesses& guesses, const std::vector<int>& owners, const Limits& limits, int swaps);

}  // namespace hecate
