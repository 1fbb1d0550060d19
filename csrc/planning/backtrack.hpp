// Copies that reach a target, found by trying sets of copies one after the other.
#pragma once

#include <cstdint>
#include <vector>

#include "planning/limits.hpp"

namespace hecate {

// Appends to `copies` what leaves no device of `network` more than `target` tokens; false if nothing found does. If no
// sends are limited there is then no such set within the limits, unless `trials`, which every set that is looked at
// lowers by one, has come to 0.
bool backtrack(const Network& network, std::int64_t target, const Limits& limits, int& trials,
               std::vector<Pair>& copies);

}  // namespace hecate
