// Integer costs of allocations and limits of budgets, exactly as l2a_compress/cost.py and limits.py have them.
#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

namespace l2a::core {

// Sizes of the decoder; the manifest has checked them.
struct Shape {
    std::int64_t num_layers = 0;
    std::int64_t hidden_size = 0;
    std::int64_t intermediate_size = 0;
    std::int64_t num_heads = 0;
    std::int64_t num_groups = 0;
    std::int64_t head_dim = 0;
    std::int64_t vocab_size = 0;
};

struct Budget {
    double compute = 1.0;  // share of the dense compute, in (0, 1]
    std::optional<std::int64_t> layers;
    std::optional<std::int64_t> heads;
    std::optional<std::int64_t> think_tokens;

    // Throws a budget error where a value is out of range.
    void check() const;
};

using Widths = std::vector<std::int64_t>;  // kept KV groups of each layer; 0: the layer is skipped

class CostModel {
  public:
    // The units of one layer and of one group; none where those of the dense model are 2^63 or more.
    static std::optional<CostModel> of(const Shape& shape);

    [[nodiscard]] std::int64_t layer_units() const { return layer_; }
    [[nodiscard]] std::int64_t group_units() const { return group_; }
    [[nodiscard]] std::int64_t dense_units() const { return dense_; }
    [[nodiscard]] std::int64_t units(const Widths& widths) const;
    // Most units that a compute budget allows: floor((compute + 1e-12) * dense), in exact arithmetic.
    [[nodiscard]] std::int64_t limit(double compute) const;
    // Whether an allocation keeps the compute, the layers and the heads of a budget.
    [[nodiscard]] bool fits(const Widths& widths, const Budget& budget) const;

  private:
    std::int64_t layer_ = 0;
    std::int64_t group_ = 0;
    std::int64_t dense_ = 0;
};

// A budget as a graph's inputs.
struct Told {
    float compute = 1.0F;
    float share = 1.0F;
    std::int64_t units = 0;
    std::int64_t layers = 0;
    std::int64_t heads = 0;
    float price = -std::numeric_limits<float>::infinity();
};
bool operator==(const Told& one, const Told& other);

enum class Contract { cap, mean };
using Prices = std::vector<std::pair<double, double>>;  // (budget, price), budgets ascend

struct GateRules {
    std::int64_t stem_layers = 1;
    std::int64_t think_reference = 1;
    Prices prices;
    std::vector<Contract> input_blind;  // under which all prompts get the same at a budget
    // Whether the gates do not read the prompt under what they are told.
    [[nodiscard]] bool blind(const Told& told) const;
};

// Throws a budget error where the budget is below what the stem alone costs, or `mean` has no price for it.
Told told_of(const Budget& budget, const CostModel& cost, const Shape& shape, const GateRules& rules,
             Contract contract);

}  // namespace l2a::core
