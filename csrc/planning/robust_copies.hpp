// Copies for guessed loads, planned before the step: copies that other work hides cost nothing, so they are used for
// robustness.
#pragma once

#include <vector>

#include "planning/ensemble.hpp"
#include "planning/limits.hpp"

namespace hecate {

// Copies in addition to `owners` and to the copies `given` that balance all guesses as well as the limits allow: first those that the likeliest
// guess needs; then those that take most load from overloaded devices over all guesses, while the target is tightened
// step by step; then a local search with at most `trials` trials, each giving a slot to another expert.
std::vector<Pair> robust_copies(const Guesses& guesses, const std::vector<int>& owners, const std::vector<Pair>& given,
                                const Limits& limits, int trials);

}  // namespace hecate
