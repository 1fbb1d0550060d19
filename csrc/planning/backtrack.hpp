// Finds copies that reach a target by trying sets of copies one after the other.
#pragma once

#include <cstdint>
#include <vector>

#include "planning/limits.hpp"
#include "planning/network.hpp"

namespace hecate {

// Appends to `copies` a set of copies after which no device of `network` has more than `target` tokens; returns false
// if none was found. Each set that is examined lowers `trials` by one. If the search fails with `trials` above 0 and
// the number of sends is not limited, no such set exists within the limits.
bool backtrack(const Network& network, std::int64_t target, const Limits& limits, int& trials,
               std::vector<Pair>& copies);

}  // namespace hecate
