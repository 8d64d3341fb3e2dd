#include "cost.hpp"

#include <algorithm>
#include <cmath>
#include <string>

#include "error.hpp"

namespace l2a::core {
namespace {

__extension__ using Wide = unsigned __int128;

constexpr std::int64_t kNoise = 1'000'000'000'000;  // one unit in so many of the dense cost is forgiven

// INT64_MAX where the result is larger; costs are even, so that it means nothing else.
std::int64_t product(std::initializer_list<std::int64_t> factors) {
    std::int64_t found = 1;
    for (const std::int64_t factor : factors) {
        if (__builtin_mul_overflow(found, factor, &found)) return INT64_MAX;
    }
    return found;
}

std::int64_t sum(std::int64_t one, std::int64_t other) {
    std::int64_t found = 0;
    return __builtin_add_overflow(one, other, &found) ? INT64_MAX : found;
}

void at_least(std::optional<std::int64_t> value, std::int64_t minimum, const char* name) {
    if (value && *value < minimum) {
        budget_error(std::string("budget.") + name + " must be at least " + std::to_string(minimum) + ", found " +
                     std::to_string(*value));
    }
}

// ceil(share * 2^bits / kNoise) for share <= kNoise and bits <= 126.
Wide scaled(std::int64_t share, int bits) {
    Wide value = static_cast<Wide>(share) / kNoise;
    auto rest = static_cast<std::uint64_t>(share % kNoise);
    for (int bit = 0; bit < bits; ++bit) {
        rest *= 2;
        value = value * 2 + (rest >= static_cast<std::uint64_t>(kNoise) ? 1 : 0);
        rest %= static_cast<std::uint64_t>(kNoise);
    }
    return rest == 0 ? value : value + 1;
}

double price_of(double compute, const Prices& prices) {
    if (prices.empty()) {
        budget_error("contract 'mean' needs calibrated prices, and this model has none; calibrate it or use 'cap'");
    }
    if (compute >= 1.0) return -1e9;  // the whole budget: everything runs
    if (compute < prices.front().first - 1e-9 || compute > prices.back().first + 1e-9) {
        budget_error("budget " + std::to_string(compute) + " lies outside the calibrated range of 'mean'");
    }
    if (prices.size() == 1) return prices.front().second;
    std::size_t right = 1;
    while (right + 1 < prices.size() && prices[right].first < compute) ++right;
    const auto& [b0, p0] = prices[right - 1];
    const auto& [b1, p1] = prices[right];
    return p0 + (p1 - p0) * (compute - b0) / (b1 - b0);
}

}  // namespace

void Budget::check() const {
    if (!(compute > 0.0 && compute <= 1.0)) {
        budget_error("budget.compute must be in (0, 1], found " + std::to_string(compute) + "; 1.0 is the dense model");
    }
    at_least(layers, 1, "layers");
    at_least(heads, 1, "heads");
    at_least(think_tokens, 0, "think_tokens");
}

bool operator==(const Told& one, const Told& other) {
    return one.compute == other.compute && one.share == other.share && one.units == other.units &&
           one.layers == other.layers && one.heads == other.heads && one.price == other.price;
}

std::optional<CostModel> CostModel::of(const Shape& shape) {
    CostModel found;
    found.layer_ = product({6, shape.hidden_size, shape.intermediate_size});
    const std::int64_t heads = sum(product({2, shape.num_heads / shape.num_groups}), 2);
    found.group_ = product({2, heads, shape.head_dim, shape.hidden_size});
    const std::int64_t layer = sum(found.layer_, product({shape.num_groups, found.group_}));
    found.dense_ = product({shape.num_layers, layer});
    if (found.dense_ == INT64_MAX) return std::nullopt;
    return found;
}

std::int64_t CostModel::units(const Widths& widths) const {
    std::int64_t found = 0;
    for (const std::int64_t width : widths) found += width == 0 ? 0 : layer_ + width * group_;
    return found;
}

std::int64_t CostModel::limit(double compute) const {
    // compute = mantissa / 2^bits. With dense * mantissa / 2^bits = whole + rest / 2^bits, and dense / kNoise = a + b /
    // kNoise, the floor of the sum is whole + a, and one more where the two rests are 1 together.
    int exponent = 0;
    auto mantissa = static_cast<std::uint64_t>(std::ldexp(std::frexp(compute, &exponent), 53));
    int bits = 53 - exponent;
    while (mantissa % 2 == 0 && bits > 0) {
        mantissa /= 2;
        --bits;
    }
    if (bits > 126) return dense_ / kNoise;  // below 2^-73 of the dense cost, which is less than a unit
    const Wide exact = static_cast<Wide>(dense_) * mantissa;
    const Wide rest = exact & ((static_cast<Wide>(1) << bits) - 1);
    const auto whole = static_cast<std::int64_t>(exact >> bits) + dense_ / kNoise;
    const bool carry = rest >= scaled(kNoise - dense_ % kNoise, bits);
    return std::min(whole + (carry ? 1 : 0), dense_);
}

bool CostModel::fits(const Widths& widths, const Budget& budget) const {
    std::int64_t layers = 0;
    std::int64_t heads = 0;
    for (const std::int64_t width : widths) {
        layers += width > 0 ? 1 : 0;
        heads += width;
    }
    return units(widths) <= limit(budget.compute) && (!budget.layers || layers <= *budget.layers) &&
           (!budget.heads || heads <= *budget.heads);
}

bool GateRules::blind(const Told& told) const {
    const Contract contract = std::isinf(told.price) ? Contract::cap : Contract::mean;
    return std::find(input_blind.begin(), input_blind.end(), contract) != input_blind.end();
}

Told told_of(const Budget& budget, const CostModel& cost, const Shape& shape, const GateRules& rules,
             Contract contract) {
    const std::int64_t stem = rules.stem_layers;
    const std::int64_t stem_heads = stem * shape.num_groups;
    const std::int64_t stem_units = stem * cost.layer_units() + stem_heads * cost.group_units();
    if (cost.limit(budget.compute) < stem_units) {
        budget_error("compute budget " + std::to_string(budget.compute) + " is below what the " + std::to_string(stem) +
                     " always-on layers cost; raise it");
    }
    if (budget.layers && *budget.layers < stem) {
        budget_error("layer cap " + std::to_string(*budget.layers) + " is below the " + std::to_string(stem) +
                     " always-on layers; raise it");
    }
    if (budget.heads && *budget.heads < stem_heads) {
        budget_error("head cap " + std::to_string(*budget.heads) + " is below the " + std::to_string(stem_heads) +
                     " KV groups of the always-on layers; raise it");
    }
    Told told;
    told.compute = static_cast<float>(budget.compute);
    if (budget.think_tokens) {
        told.share = static_cast<float>(
            std::min(1.0, static_cast<double>(*budget.think_tokens) / static_cast<double>(rules.think_reference)));
    }
    told.units = (contract == Contract::cap ? cost.limit(budget.compute) : cost.dense_units()) - stem_units;
    told.layers = budget.layers.value_or(shape.num_layers) - stem;
    told.heads = budget.heads.value_or(shape.num_layers * shape.num_groups) - stem_heads;
    if (contract == Contract::mean) told.price = static_cast<float>(price_of(budget.compute, rules.prices));
    return told;
}

}  // namespace l2a::core
