#include "capi.hpp"
#include "runtime.hpp"

#ifndef L2A_VERSION
#define L2A_VERSION "0"
#endif

struct l2a_runtime {
    std::shared_ptr<const l2a::core::Runtime> runtime;
};

namespace l2a::core {

l2a_status* status_without_memory() noexcept {
    static l2a_status only{L2A_ERROR_OUT_OF_MEMORY, {}};  // not written after it is made
    return &only;
}

std::shared_ptr<const Runtime> runtime_of(const l2a_runtime* runtime) {
    return given(runtime, "runtime").runtime;
}

}  // namespace l2a::core

namespace {

using l2a::core::given;

const l2a::core::Graph* graph_of(const l2a_runtime* runtime, std::size_t graph) noexcept {
    if (runtime == nullptr || graph >= runtime->runtime->graphs().size()) return nullptr;
    return runtime->runtime->graphs()[graph].get();
}

const l2a::core::Graph& known_graph(const l2a_runtime* runtime, std::size_t graph) {
    const l2a::core::Graph* found = graph_of(&given(runtime, "runtime"), graph);
    if (found == nullptr) l2a::core::config_error("graph " + std::to_string(graph) + ": there are fewer open");
    return *found;
}

}  // namespace

uint32_t l2a_abi_version(void) {
    return L2A_ABI_VERSION;
}
const char* l2a_version(void) {
    return L2A_VERSION;
}

l2a_code l2a_status_code(const l2a_status* status) {
    return status == nullptr ? L2A_OK : status->code;
}
const char* l2a_status_message(const l2a_status* status) {
    return status == nullptr ? "" : status->message.c_str();
}
void l2a_status_free(l2a_status* status) {
    if (status != l2a::core::status_without_memory()) delete status;
}

void l2a_runtime_options_init(l2a_runtime_options* options, size_t size) {
    const uint32_t graphs = L2A_GRAPH_IF | L2A_GRAPH_VARIANTS | L2A_GRAPH_ROUTER;
    l2a::core::init_struct(options, size, l2a_runtime_options{0, 0, L2A_CONTRACT_CAP, graphs});
}

l2a_status* l2a_verify(const char* folder) {
    return l2a::core::guarded([&] { l2a::core::Bundle::open(&given(folder, "folder")); });
}

l2a_status* l2a_runtime_open(const char* folder, const l2a_runtime_options* options, l2a_runtime** out) {
    return l2a::core::guarded([&] {
        given(out, "out");
        l2a_runtime_options asked;
        l2a_runtime_options_init(&asked, sizeof asked);
        l2a::core::read_struct(options, asked);
        if (asked.threads < 0) l2a::core::config_error("threads must be at least 0");
        if (asked.contract != L2A_CONTRACT_CAP && asked.contract != L2A_CONTRACT_MEAN) {
            l2a::core::config_error("contract must be L2A_CONTRACT_CAP or L2A_CONTRACT_MEAN");
        }
        const l2a::core::RuntimeOptions found{
            asked.threads, asked.contract == L2A_CONTRACT_CAP ? l2a::core::Contract::cap : l2a::core::Contract::mean,
            asked.graphs};
        auto made = std::make_shared<const l2a::core::Runtime>(&given(folder, "folder"), found);
        *out = new l2a_runtime{std::move(made)};
    });
}

void l2a_runtime_free(l2a_runtime* runtime) {
    delete runtime;
}

const char* l2a_runtime_manifest(const l2a_runtime* runtime) {
    return runtime == nullptr ? "" : runtime->runtime->bundle().text.c_str();
}

l2a_status* l2a_runtime_model(const l2a_runtime* runtime, l2a_model_info* info) {
    return l2a::core::guarded([&] {
        const l2a::core::Manifest& manifest = given(runtime, "runtime").runtime->manifest();
        const l2a::core::Tags& tags = manifest.tags;
        l2a::core::write_struct<l2a_model_info>(
            {0, manifest.shape.num_layers, manifest.shape.num_groups, manifest.shape.vocab_size, manifest.positions,
             tags.think, tags.end_think, tags.answer, tags.end_answer},
            info);
    });
}

size_t l2a_runtime_graph_count(const l2a_runtime* runtime) {
    return runtime == nullptr ? 0 : runtime->runtime->graphs().size();
}

const char* l2a_runtime_graph_name(const l2a_runtime* runtime, size_t graph) {
    const l2a::core::Graph* found = graph_of(runtime, graph);
    return found == nullptr ? nullptr : found->entry().name.c_str();
}

size_t l2a_runtime_cache_count(const l2a_runtime* runtime, size_t graph) {
    const l2a::core::Graph* found = graph_of(runtime, graph);
    return found == nullptr ? 0 : found->caches().size();
}

l2a_status* l2a_runtime_cache(const l2a_runtime* runtime, size_t graph, size_t place, l2a_cache_info* info) {
    return l2a::core::guarded([&] {
        const auto& caches = known_graph(runtime, graph).caches();
        if (place >= caches.size()) l2a::core::config_error("cache " + std::to_string(place) + ": the graph has fewer");
        const l2a::core::CacheInput& cache = caches[place];
        given(info, "info") = {cache.past.c_str(), cache.groups, cache.head_dim, static_cast<int32_t>(cache.type)};
    });
}

l2a_status* l2a_runtime_run(const l2a_runtime* runtime, size_t graph, const l2a_run* run) {
    return l2a::core::guarded([&] {
        const l2a::core::Graph& found = known_graph(runtime, graph);
        l2a_run asked{};
        l2a::core::read_struct(&given(run, "run"), asked);
        if (asked.batch < 1 || (!found.caches().empty() && asked.capacity < asked.total)) {
            l2a::core::config_error("a run needs a batch, and caches of as many positions as the mask has columns");
        }
        l2a::core::OrtValues views;
        for (std::size_t place = 0; place < found.caches().size(); ++place) {
            void* buffer = (&given(asked.caches, "caches"))[place];
            if (buffer == nullptr) l2a::core::config_error("a cache must not be NULL");
            views.push_back(found.view(found.caches()[place], buffer, asked.batch, asked.capacity));
        }
        l2a::core::Run wanted;
        wanted.batch = asked.batch;
        wanted.sequence = asked.sequence;
        wanted.total = asked.total;
        wanted.input_ids = asked.input_ids;
        wanted.mask = asked.mask;
        wanted.budget = asked.budget;
        wanted.limits = asked.limits;
        wanted.price = asked.price;
        wanted.allocation = asked.allocation;
        wanted.caches = &views;
        wanted.logits = asked.logits;
        wanted.kept_groups = asked.kept_groups;
        wanted.tau = asked.tau;
        wanted.variant = asked.variant;
        found.run(wanted);
    });
}
