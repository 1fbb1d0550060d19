#include "planning/ensemble.hpp"

#include <algorithm>

namespace hecate {

namespace {
constexpr std::int64_t kPermille = 1000;
}  // namespace

void Guess::set_mean(std::int64_t permille) {
  target = ceil_div(flow.total() * permille, static_cast<std::int64_t>(flow.load.size()) * kPermille);
}

void Guess::refresh(const Holding& holding) {
  std::int64_t excess = 0;
  for (std::size_t d = 0; d < room.size(); ++d) {
    const std::int64_t left = target - flow.load[d];
    room[d] = std::max<std::int64_t>(0, left);
    open[d] = !flow.reached(static_cast<int>(d));
    excess += room[d] - left;
  }
  std::fill(relief.begin(), relief.end(), 0);
  for (int d : flow.stuck())
    for (int p = holding.first_on_device(d); p >= 0; p = holding.next_on_device(p))
      relief[holding.expert_of[p]] += flow.amount[p];
  for (std::int64_t& tokens : relief) tokens = std::min(tokens, excess);
}

Ensemble::Ensemble(const Guesses& given, int level, const Holding& holding)
    : relief(holding.experts(), 0), room(holding.devices(), 0) {
  guesses.reserve(given.count);
  for (int k = 0; k < given.count; ++k) {
    Guess guess{Flow(holding.experts(), holding.devices(), 2 * holding.pairs()), 0, Tokens(holding.experts(), 0),
                Tokens(holding.devices(), 0), std::vector<char>(holding.devices(), 0)};
    for (int p = 0; p < holding.pairs(); ++p)
      guess.flow.add_pair(holding.device_of[p], p < given.experts ? given.of(level, k)[p] : 0);
    guesses.push_back(std::move(guess));
  }
}

void Ensemble::balance(const Holding& holding, std::int64_t permille) {
  for (Guess& guess : guesses) {
    count(guess, -1);
    guess.set_mean(permille);
    guess.flow.drain(holding, guess.target);
    guess.refresh(holding);
    count(guess, 1);
  }
}

void Ensemble::add_pair(int device) {
  for (Guess& guess : guesses) guess.flow.add_pair(device, 0);
}

void Ensemble::follow(const Holding& holding, const std::vector<int>& before) {
  for (int p = 0; p < holding.pairs(); ++p)
    for (Guess& guess : guesses) {
      if (holding.expert_of[p] == before[p]) break;
      const std::int64_t tokens = guess.flow.amount[p];
      guess.flow.add_amount(holding, p, -tokens);
      guess.flow.add_amount(holding, before[p], tokens);
    }
}

// In the other guesses, the new pair leads from no overloaded device to any that tokens could not reach before.
void Ensemble::balance_newest(const Holding& holding) {
  const int expert = holding.expert_of.back(), device = holding.device_of.back();
  for (Guess& guess : guesses) {
    if (!guess.helped_by(expert, device)) continue;
    count(guess, -1);
    guess.flow.drain(holding, guess.target);
    guess.refresh(holding);
    count(guess, 1);
  }
}

void Ensemble::values_of(int expert, const std::vector<int>& devices, Tokens& values) const {
  values.assign(devices.size(), 0);
  for (const Guess& guess : guesses) {
    const std::int64_t most = guess.relief[expert];
    if (most == 0) continue;
    for (std::size_t i = 0; i < devices.size(); ++i) values[i] += std::min(most, guess.room[devices[i]]);
  }
}

void Ensemble::count(const Guess& guess, std::int64_t sign) {
  for (std::size_t e = 0; e < relief.size(); ++e) relief[e] += sign * guess.relief[e];
  for (std::size_t d = 0; d < room.size(); ++d) room[d] += sign * guess.room[d];
}

}  // namespace hecate
