#include "capi.hpp"
#include "engine.hpp"

struct l2a_engine {
    l2a::core::Engine engine;
};

namespace l2a::core {
std::shared_ptr<const Runtime> runtime_of(const l2a_runtime* runtime);
}

namespace {

using l2a::core::given;

std::optional<std::int64_t> cap_of(std::int64_t value) {
    return value == -1 ? std::nullopt : std::optional<std::int64_t>(value);
}

l2a::core::Budget budget_of(const l2a_budget& budget) {
    return {budget.compute, cap_of(budget.layers), cap_of(budget.heads), cap_of(budget.think_tokens)};
}

const l2a::core::Request* found(const l2a_engine* engine, uint64_t id) noexcept {
    try {
        return engine == nullptr ? nullptr : &engine->engine.request(id);
    } catch (...) {
        return nullptr;
    }
}

}  // namespace

void l2a_engine_options_init(l2a_engine_options* options, size_t size) {
    l2a::core::init_struct(options, size, l2a_engine_options{0, L2A_SERVE_IF, 8, 0, nullptr, nullptr});
}

l2a_status* l2a_engine_create(l2a_runtime* runtime, const l2a_engine_options* options, l2a_engine** out) {
    return l2a::core::guarded([&] {
        given(out, "out");
        l2a_engine_options asked;
        l2a_engine_options_init(&asked, sizeof asked);
        l2a::core::read_struct(options, asked);
        if (asked.serve != L2A_SERVE_IF && asked.serve != L2A_SERVE_VARIANTS) {
            l2a::core::config_error("serve must be L2A_SERVE_IF or L2A_SERVE_VARIANTS");
        }
        if (asked.max_cache_bytes < 0) l2a::core::config_error("max_cache_bytes must be at least 0");
        l2a::core::EngineOptions wanted{asked.serve == L2A_SERVE_VARIANTS, asked.max_rows, asked.max_cache_bytes, {}};
        if (asked.memory_left != nullptr) {
            wanted.memory_left = [asked] { return asked.memory_left(asked.memory_context); };
        }
        *out = new l2a_engine{l2a::core::Engine(l2a::core::runtime_of(runtime), wanted)};
    });
}

void l2a_engine_free(l2a_engine* engine) {
    delete engine;
}

void l2a_request_options_init(l2a_request_options* options, size_t size) {
    const l2a::core::Limits limits;
    l2a::core::init_struct(options, size,
                           l2a_request_options{0, l2a::core::shown(l2a::core::Budget{}), limits.max_think_tokens,
                                               limits.max_answer_tokens, limits.tau_threshold, 0.0, 0, 1.0, 0});
}

l2a_status* l2a_engine_submit(l2a_engine* engine, const int64_t* prompt, size_t size,
                              const l2a_request_options* options, uint64_t* id) {
    return l2a::core::guarded([&] {
        l2a_request_options asked;
        l2a_request_options_init(&asked, sizeof asked);
        l2a::core::read_struct(options, asked);
        std::vector<std::int64_t> tokens;
        if (size > 0) tokens.assign(&given(prompt, "prompt"), prompt + size);
        uint64_t& number = given(id, "id");
        number = given(engine, "engine")
                     .engine.submit(std::move(tokens), budget_of(asked.budget),
                                    {asked.max_think_tokens, asked.max_answer_tokens, asked.tau_threshold},
                                    {asked.temperature, asked.top_k, asked.top_p, asked.seed});
    });
}

l2a_status* l2a_engine_set_budget(l2a_engine* engine, uint64_t id, const l2a_budget* budget) {
    return l2a::core::guarded([&] {
        l2a::core::Engine& used = given(engine, "engine").engine;
        used.set_budget(used.request(id), budget_of(given(budget, "budget")));
    });
}

l2a_status* l2a_engine_cancel(l2a_engine* engine, uint64_t id) {
    return l2a::core::guarded([&] {
        l2a::core::Engine& used = given(engine, "engine").engine;
        used.cancel(used.request(id));
    });
}

l2a_status* l2a_engine_step(l2a_engine* engine, int32_t* busy) {
    return l2a::core::guarded([&] {
        l2a::core::Engine& used = given(engine, "engine").engine;
        used.step();
        if (busy != nullptr) *busy = used.busy() ? 1 : 0;
    });
}

l2a_status* l2a_engine_info(const l2a_engine* engine, uint64_t id, l2a_request_info* info) {
    return l2a::core::guarded([&] {
        const l2a::core::Engine& used = given(engine, "engine").engine;
        const l2a::core::Request& request = used.request(id);
        const l2a::core::CostModel& cost = used.runtime().manifest().cost;
        int64_t layers = 0;
        int64_t heads = 0;
        for (const std::int64_t width : request.kept) {
            layers += width > 0 ? 1 : 0;
            heads += width;
        }
        const double share = static_cast<double>(cost.units(request.kept)) / static_cast<double>(cost.dense_units());
        l2a::core::write_struct<l2a_request_info>(
            {0, request.done() ? 1 : 0, request.row >= 0 && !request.done() ? 1 : 0, request.reasoning.stopped_by,
             request.error, layers, heads, share, l2a::core::shown(request.budget)},
            info);
    });
}

const char* l2a_engine_error(const l2a_engine* engine, uint64_t id) {
    const l2a::core::Request* request = found(engine, id);
    return request == nullptr ? "" : request->message.c_str();
}

const int64_t* l2a_engine_tokens(const l2a_engine* engine, uint64_t id, int32_t part, size_t* size) {
    if (size != nullptr) *size = 0;
    const l2a::core::Request* request = found(engine, id);
    if (request == nullptr || size == nullptr) return nullptr;
    const std::vector<std::int64_t>& tokens = part == L2A_TOKENS_THINK    ? request->reasoning.think
                                              : part == L2A_TOKENS_ANSWER ? request->reasoning.answer
                                                                          : request->written;
    *size = tokens.size();
    return tokens.data();
}

const int64_t* l2a_engine_allocation(const l2a_engine* engine, uint64_t id) {
    const l2a::core::Request* request = found(engine, id);
    return request == nullptr || request->kept.empty() ? nullptr : request->kept.data();
}

l2a_status* l2a_engine_forget(l2a_engine* engine, uint64_t id) {
    return l2a::core::guarded([&] { given(engine, "engine").engine.forget(id); });
}

l2a_status* l2a_engine_statistics(const l2a_engine* engine, l2a_engine_stats* stats) {
    return l2a::core::guarded([&] {
        const l2a::core::Engine& used = given(engine, "engine").engine;
        l2a::core::write_struct<l2a_engine_stats>(
            {0, used.waiting(), used.running(), used.oldest_seconds(), used.cache_bytes(), used.copied_rows(),
             used.recomputed_rows(), used.held_bytes()},
            stats);
    });
}
