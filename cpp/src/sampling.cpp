#include "sampling.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>

#include "error.hpp"

namespace l2a::core {
namespace {

constexpr std::size_t kAtFirst = 256, kMore = 16;  // tokens that are sorted, and times as many where these do not do

// numpy.random.SeedSequence, after O'Neill's seed_seq_fe: a pool of four words of 32 bits.
class SeedSequence {
  public:
    explicit SeedSequence(std::uint64_t seed) {
        const std::array<std::uint32_t, 4> entropy{static_cast<std::uint32_t>(seed),
                                                   static_cast<std::uint32_t>(seed >> 32), 0, 0};
        std::uint32_t constant = 0x43b0d7e5;
        for (std::size_t at = 0; at < pool_.size(); ++at) pool_[at] = hashed(entropy[at], constant);
        for (std::size_t from = 0; from < pool_.size(); ++from) {
            for (std::size_t to = 0; to < pool_.size(); ++to) {
                if (from != to) pool_[to] = mixed(pool_[to], hashed(pool_[from], constant));
            }
        }
    }
    // Four words of 64 bits.
    [[nodiscard]] std::array<std::uint64_t, 4> words() const {
        std::array<std::uint64_t, 4> found{};
        std::uint32_t constant = 0x8b51f9dd;
        for (std::size_t at = 0; at < 8; ++at) {
            std::uint32_t value = pool_[at % 4] ^ constant;
            constant *= 0x58f38ded;
            value *= constant;
            value ^= value >> 16;
            found[at / 2] |= static_cast<std::uint64_t>(value) << (at % 2 * 32);
        }
        return found;
    }

  private:
    std::array<std::uint32_t, 4> pool_{};

    static std::uint32_t hashed(std::uint32_t value, std::uint32_t& constant) {
        value ^= constant;
        constant *= 0x931e8875;
        value *= constant;
        return value ^ (value >> 16);
    }
    static std::uint32_t mixed(std::uint32_t one, std::uint32_t other) {
        const std::uint32_t value = 0xca01f9dd * one - 0x4973f715 * other;
        return value ^ (value >> 16);
    }
};

// Indices of the tokens that may be drawn, the most likely first; of equal ones the smaller index.
// Places of so many of the largest values, the largest first; of equal ones the first comes first.
std::vector<std::size_t> first(const std::vector<double>& values, std::size_t count) {
    std::vector<std::size_t> order(values.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    const auto before = [&](std::size_t one, std::size_t other) {
        return values[one] != values[other] ? values[one] > values[other] : one < other;
    };
    if (count >= order.size()) {
        std::sort(order.begin(), order.end(), before);
    } else {
        const auto end = order.begin() + static_cast<std::ptrdiff_t>(count);
        std::partial_sort(order.begin(), end, order.end(), before);
        order.erase(end, order.end());
    }
    return order;
}

// Sums of the weights of the values at these places, up to each of them. The largest value of all weighs 1.
std::vector<double> sums(const std::vector<double>& values, double most, const std::vector<std::size_t>& order) {
    std::vector<double> found(order.size());
    double sum = 0;
    for (std::size_t at = 0; at < order.size(); ++at) found[at] = sum += std::exp(values[order[at]] - most);
    return found;
}

// The place of the largest value, of equal ones the first; `size` where one of them is not a number. Lanes have a
// maximum each, and only the block that holds the largest value is searched, so that compilers can vectorize it.
std::size_t largest(const float* values, std::size_t size) {
    constexpr std::size_t kLanes = 32, kBlock = 32 * kLanes;
    float most = -std::numeric_limits<float>::infinity();
    std::size_t block = 0;
    std::array<unsigned, kLanes> odd{};
    for (std::size_t start = 0; start < size; start += kBlock) {
        const std::size_t end = std::min(start + kBlock, size);
        std::array<float, kLanes> best;
        best.fill(values[start]);
        std::size_t at = start;
        for (; at + kLanes <= end; at += kLanes) {
            for (std::size_t lane = 0; lane < kLanes; ++lane) {
                const float value = values[at + lane];
                best[lane] = value > best[lane] ? value : best[lane];
                odd[lane] |= static_cast<unsigned>(value != value);
            }
        }
        for (; at < end; ++at) {
            best[0] = std::max(best[0], values[at]);
            odd[0] |= static_cast<unsigned>(values[at] != values[at]);
        }
        const float highest = *std::max_element(best.begin(), best.end());
        if (highest > most) {
            most = highest;
            block = start;
        }
    }
    if (std::any_of(odd.begin(), odd.end(), [](unsigned one) { return one != 0; })) return size;
    return static_cast<std::size_t>(std::find(values + block, values + size, most) - values);
}

}  // namespace

void Sampling::check() const {
    if (!(temperature >= 0) || std::isinf(temperature)) {
        config_error("temperature must be at least 0 and finite, found " + std::to_string(temperature));
    }
    if (top_k < 0) config_error("top_k must be at least 0, found " + std::to_string(top_k));
    if (!(top_p > 0 && top_p <= 1)) config_error("top_p must be in (0, 1], found " + std::to_string(top_p));
}

Pcg64::Pcg64(std::uint64_t seed) {
    const auto words = SeedSequence(seed).words();
    increment_ = (((static_cast<Wide>(words[2]) << 64) | words[3]) << 1) | 1;
    step();
    state_ += (static_cast<Wide>(words[0]) << 64) | words[1];
    step();
}

void Pcg64::step() {
    const Wide multiplier = (static_cast<Wide>(2549297995355413924ULL) << 64) | 4865540595714422341ULL;
    state_ = state_ * multiplier + increment_;
}

std::uint64_t Pcg64::next() {
    step();
    const auto folded = static_cast<std::uint64_t>(state_ >> 64) ^ static_cast<std::uint64_t>(state_);
    const auto turn = static_cast<unsigned>(state_ >> 122);
    return (folded >> turn) | (folded << ((64 - turn) & 63));
}

double Pcg64::uniform() {
    return static_cast<double>(next() >> 11) * 0x1.0p-53;
}

std::int64_t Sampler::token(const float* logits, std::size_t size) {
    const std::size_t likeliest = largest(logits, size);
    if (likeliest == size) {
        throw Error(L2A_ERROR_SESSION, "the model's logits are not numbers; export with another precision");
    }
    if (settings_.temperature == 0) return static_cast<std::int64_t>(likeliest);
    std::vector<double> scaled(logits, logits + size);
    for (double& value : scaled) value /= settings_.temperature;
    Pcg64 drawn = draw_;  // a draw that ends for want of memory is made again
    const double most = scaled[likeliest], draw = drawn.uniform();
    if (!std::isfinite(most)) {  // weights would be no numbers
        draw_ = drawn;
        return static_cast<std::int64_t>(likeliest);
    }
    const bool few = settings_.top_k > 0;
    std::vector<std::size_t> order = first(scaled, few ? static_cast<std::size_t>(settings_.top_k) : kAtFirst);
    std::vector<double> upto = sums(scaled, most, order);
    double whole = upto.back();
    if (!few) {
        whole = 0;
        for (const double value : scaled) whole += std::exp(value - most);
        const double reach = settings_.top_p < 1 ? settings_.top_p : draw;
        while (order.size() < size && upto.back() <= reach * whole) {
            order = first(scaled, kMore * order.size());
            upto = sums(scaled, most, order);
        }
    }
    if (settings_.top_p < 1) {
        const auto end = std::lower_bound(upto.begin(), upto.end(), settings_.top_p * whole);
        if (end != upto.end()) upto.erase(end + 1, upto.end());
        whole = upto.back();
    }
    draw_ = drawn;
    const auto place = std::upper_bound(upto.begin(), upto.end(), draw * whole) - upto.begin();
    return static_cast<std::int64_t>(order[std::min(static_cast<std::size_t>(place), upto.size() - 1)]);
}

}  // namespace l2a::core
