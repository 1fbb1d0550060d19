// Copies for loads that are guessed: ahead of time, where hidden bytes are free and buy robustness.
#pragma once

#include <cstdint>
#include <vector>

#include "planner/limits.hpp"

namespace hecate {

// Adds copies for several guesses of the loads at once until the limits are used up or nothing is left to gain.
// `levels` holds ever more pessimistic sets of guesses, each [guesses, experts]; `held` the holders so far.
// Returns the copies in the order of their use.
std::vector<Pair> spread(const std::int64_t* levels, int num_levels, int guesses, const std::vector<Pair>& held,
                         int experts, int devices, Limits limits);

}  // namespace hecate
