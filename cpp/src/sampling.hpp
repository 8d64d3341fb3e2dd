// From logits to the next token, with the draws of NumPy's default_rng: one seed gives one text in Python and here.
#pragma once

#include <cstdint>
#include <vector>

namespace l2a::core {

struct Sampling {
    double temperature = 0.0;  // 0 takes the most likely token
    std::int64_t top_k = 0;    // 0: all
    double top_p = 1.0;        // in (0, 1]
    std::uint64_t seed = 0;

    // Throws a config error where a value is out of range.
    void check() const;
};

// PCG XSL RR 128/64 (O'Neill, HMC-CS-2014-0905), seeded as numpy.random.SeedSequence seeds it.
class Pcg64 {
  public:
    explicit Pcg64(std::uint64_t seed);
    std::uint64_t next();
    double uniform();  // in [0, 1), 53 bits

  private:
    __extension__ using Wide = unsigned __int128;
    Wide state_ = 0;
    Wide increment_ = 0;
    void step();
};

class Sampler {
  public:
    explicit Sampler(const Sampling& settings) : settings_(settings), draw_(settings.seed) {}
    // One token of `size` logits; minus infinity forbids one.
    std::int64_t token(const float* logits, std::size_t size);

  private:
    Sampling settings_;
    Pcg64 draw_;
};

}  // namespace l2a::core
