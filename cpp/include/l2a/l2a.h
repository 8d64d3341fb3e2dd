/**
 * @file l2a.h
 * @brief C interface of l2a: one bundle, every budget, one copy of the weights.
 *
 * A bundle is what `l2a compress export` writes. A runtime opens it; engines over the runtime generate text as token
 * ids.
 *
 *     bundle folder --l2a_runtime_open--> runtime --l2a_engine_create--> engine --submit, step--> tokens
 *
 * Errors: functions that can fail return a status, NULL for success; the caller frees it with l2a_status_free. No C++
 * exception leaves the library. A failed call leaves its outputs as they were, but for what a graph writes to itself.
 *
 * Threads: a runtime, a selector and a status may be used by any number of threads at once. An engine and a signals
 * object belong to one thread at a time; several engines over one runtime run at the same time without a lock of
 * this library between them. What is shared in a process is ONNX Runtime's environment, with one arena for all graphs,
 * and the C library's heap, which serves blocks of up to 32 MB once a bundle was opened.
 *
 * Ownership: what a function gives in `out` is the caller's to free, with the function of the type's name. Pointers
 * that a function returns otherwise belong to the object that was asked, and live until it is freed or as said there.
 * Freeing NULL does nothing. Objects may be freed in any order: an engine keeps its runtime open.
 *
 * Structures that begin with struct_size may grow at the end in later versions: options are made by their _init
 * function, which is told their size, as `l2a_engine_options_init(&options, sizeof options)`, and of structures that
 * are filled the caller sets struct_size; what a newer one has besides is filled with 0. Others stay as they are.
 * Units: memory in bytes, times in seconds, budgets as a share of the dense model's compute.
 */
#ifndef L2A_L2A_H_
#define L2A_L2A_H_

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define L2A_API __attribute__((visibility("default")))
#else
#define L2A_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/** Changes when a program must be compiled again. */
#define L2A_ABI_VERSION 1

/** The L2A_ABI_VERSION that the library was built with. */
L2A_API uint32_t l2a_abi_version(void);
/** The library's version, such as "0.1.0". */
L2A_API const char* l2a_version(void);

/** @name Status
 *  @{ */

/** What went wrong; the classes of errors that the Python library has. */
typedef enum l2a_code {
    L2A_OK = 0,
    L2A_ERROR_BUDGET = 1,        /**< a budget out of range, or one that nothing can keep to */
    L2A_ERROR_CONFIG = 2,        /**< a bad option, prompt, policy or cost table */
    L2A_ERROR_BUNDLE = 3,        /**< a folder that is missing, corrupt or not a bundle */
    L2A_ERROR_SESSION = 4,       /**< a graph that cannot be loaded or run */
    L2A_ERROR_OUT_OF_MEMORY = 5, /**< not enough memory for a graph or for keys and values */
    L2A_ERROR_INTERNAL = 6       /**< a mistake of the library */
} l2a_code;

typedef struct l2a_status l2a_status;

/** L2A_OK for NULL. */
L2A_API l2a_code l2a_status_code(const l2a_status* status);
/** What is wrong, where, and what to do, in UTF-8; "" for NULL. Lives as long as the status. */
L2A_API const char* l2a_status_message(const l2a_status* status);
L2A_API void l2a_status_free(l2a_status* status);

/** @} */
/** @name Runtime
 *  An open bundle with its graphs. Every function but l2a_runtime_free may be called from any thread.
 *  @{ */

typedef struct l2a_runtime l2a_runtime;

/** Which graphs are opened. All of them share the weights, so another one costs little. */
enum { L2A_GRAPH_IF = 1, L2A_GRAPH_VARIANTS = 2, L2A_GRAPH_ROUTER = 4 };

/** Under which contract the gates allocate. */
enum { L2A_CONTRACT_CAP = 0, L2A_CONTRACT_MEAN = 1 };

typedef struct l2a_runtime_options {
    uint32_t struct_size;
    int32_t threads;  /**< of one operator; 0 (the default) leaves it to ONNX Runtime */
    int32_t contract; /**< L2A_CONTRACT_CAP is the default */
    uint32_t graphs;  /**< of L2A_GRAPH_*; those that the bundle lacks are left out; default all */
} l2a_runtime_options;

L2A_API void l2a_runtime_options_init(l2a_runtime_options* options, size_t size);

/**
 * Verifies a bundle as docs/bundle.md says, without loading a graph.
 * @param folder UTF-8 path.
 * @return L2A_ERROR_BUNDLE where it is not whole.
 */
L2A_API l2a_status* l2a_verify(const char* folder);

/**
 * Opens a bundle: verifies every file, maps the weights, and opens its graphs over them. The files must not be changed
 * while it is open.
 * @param folder UTF-8 path.
 * @param options NULL for the defaults.
 * @return L2A_ERROR_BUNDLE, L2A_ERROR_CONFIG, L2A_ERROR_SESSION or L2A_ERROR_OUT_OF_MEMORY.
 */
L2A_API l2a_status* l2a_runtime_open(const char* folder, const l2a_runtime_options* options, l2a_runtime** out);
/** No thread may be in a call with it any more. */
L2A_API void l2a_runtime_free(l2a_runtime* runtime);

/** Text of manifest.json, UTF-8, as it was verified. */
L2A_API const char* l2a_runtime_manifest(const l2a_runtime* runtime);

/** What a caller needs to know of the model. */
typedef struct l2a_model_info {
    uint32_t struct_size;
    int64_t num_layers;
    int64_t num_groups; /**< KV groups of a layer */
    int64_t vocab_size;
    int64_t positions; /**< most tokens of a sequence, prompt included */
    int64_t think;     /**< token ids of the tags */
    int64_t end_think;
    int64_t answer;
    int64_t end_answer;
} l2a_model_info;

/** Fills the structure, whose struct_size the caller has set to its size. */
L2A_API l2a_status* l2a_runtime_model(const l2a_runtime* runtime, l2a_model_info* info);

/** @} */
/** @name Graphs
 *  The open graphs, for callers with a batching of their own. @see l2a_engine for generation.
 *  @{ */

/** Graphs that are open, in the manifest's order. */
L2A_API size_t l2a_runtime_graph_count(const l2a_runtime* runtime);
/** Name of a graph as in the manifest; NULL beyond the last. */
L2A_API const char* l2a_runtime_graph_name(const l2a_runtime* runtime, size_t graph);

/** One past_key_values input: [batch, groups, capacity, head_dim]. */
typedef struct l2a_cache_info {
    const char* name;
    int64_t groups;
    int64_t head_dim;
    int32_t type; /**< ONNX: 1 float, 10 float16, 16 bfloat16 */
} l2a_cache_info;

L2A_API size_t l2a_runtime_cache_count(const l2a_runtime* runtime, size_t graph);
L2A_API l2a_status* l2a_runtime_cache(const l2a_runtime* runtime, size_t graph, size_t place, l2a_cache_info* info);

/** Inputs and outputs of one run, as in docs/bundle.md; arrays are row-major and the caller's. */
typedef struct l2a_run {
    uint32_t struct_size;
    int64_t batch;
    int64_t sequence;
    int64_t total;             /**< columns of the mask: tokens of the longest row, the new ones included */
    const int64_t* input_ids;  /**< [batch, sequence] */
    const int64_t* mask;       /**< [batch, total] */
    const float* budget;       /**< [batch, 2]; NULL for a variant, as the next three */
    const int64_t* limits;     /**< [batch, 3] */
    const float* price;        /**< [batch] */
    const int64_t* allocation; /**< [batch, layers]; NULL for a router */
    void* const* caches;       /**< one buffer for each cache of the graph, read and written in place */
    int64_t capacity;          /**< positions of these buffers */
    float* logits;             /**< [batch, vocabulary]; NULL for a router, as tau */
    int64_t* kept_groups;      /**< [batch, layers]; NULL for a variant */
    float* tau;                /**< [batch]; NULL for a variant */
    int64_t* variant;          /**< [batch]; of a router over variants, else NULL */
} l2a_run;

/**
 * Runs a graph once. Any thread; two runs at a time must not write the same buffers.
 * @return L2A_ERROR_CONFIG where an array is missing, L2A_ERROR_SESSION or L2A_ERROR_OUT_OF_MEMORY.
 */
L2A_API l2a_status* l2a_runtime_run(const l2a_runtime* runtime, size_t graph, const l2a_run* run);

/** @} */
/** @name Engine
 *  Continuous batching: requests of any budget and length come and go between steps. One thread at a time.
 *  @{ */

typedef struct l2a_engine l2a_engine;

/** What serves requests. */
enum {
    L2A_SERVE_IF = 0,      /**< the If graph: the prompt's own allocation, rows of all budgets in one batch */
    L2A_SERVE_VARIANTS = 1 /**< the largest static variant within the budget; rows of one variant in one batch */
};

typedef struct l2a_engine_options {
    uint32_t struct_size;
    int32_t serve;           /**< L2A_SERVE_IF is the default */
    int32_t max_rows;        /**< most requests at a time, default 8; others wait */
    int64_t max_cache_bytes; /**< most bytes of keys and values; 0 (the default) for any */
    /**
     * Bytes that the process may still take, now; NAN where nobody knows and INFINITY for any amount, which both turn
     * admission by memory off. NULL (the default): of the control group and the host, whichever has less. Asked for
     * each request that might get a row, five times a second while several run, again behind each row that is
     * interrupted, and where caches must grow; by l2a_engine_step alone, on its thread. What it says must be of that
     * moment. It must neither throw nor call the engine.
     */
    double (*memory_left)(void* context);
    void* memory_context; /**< given to memory_left */
} l2a_engine_options;

L2A_API void l2a_engine_options_init(l2a_engine_options* options, size_t size);
/** @return L2A_ERROR_BUNDLE where the runtime has not the graphs to serve so, or their caches differ in type. */
L2A_API l2a_status* l2a_engine_create(l2a_runtime* runtime, const l2a_engine_options* options, l2a_engine** out);
L2A_API void l2a_engine_free(l2a_engine* engine);

/** What a request may spend. */
typedef struct l2a_budget {
    double compute;       /**< in (0, 1]; 1.0 is the dense model */
    int64_t layers;       /**< most layers; -1: no cap, as the next two */
    int64_t heads;        /**< most KV groups, summed over the layers */
    int64_t think_tokens; /**< most tokens of reasoning */
} l2a_budget;

typedef struct l2a_request_options {
    uint32_t struct_size;
    l2a_budget budget;         /**< default: all */
    int64_t max_think_tokens;  /**< default 160; the budget's cap applies besides it */
    int64_t max_answer_tokens; /**< default 16 */
    double tau_threshold;      /**< reasoning stops once the transition gate exceeds it; below 0: never; default 0.9 */
    double temperature;        /**< 0 (the default) takes the most likely token */
    int64_t top_k;             /**< 0 (the default) for all */
    double top_p;              /**< in (0, 1]; default 1 */
    uint64_t seed;             /**< of this request's draws, which do not depend on the others */
} l2a_request_options;

L2A_API void l2a_request_options_init(l2a_request_options* options, size_t size);

/**
 * Queues a request.
 * @param prompt [size] token ids, ending in `<think>`; copied.
 * @param options NULL for the defaults.
 * @param id its number, for the functions below.
 * @return L2A_ERROR_BUDGET, L2A_ERROR_CONFIG or L2A_ERROR_OUT_OF_MEMORY; nothing is queued then.
 */
L2A_API l2a_status* l2a_engine_submit(l2a_engine* engine, const int64_t* prompt, size_t size,
                                      const l2a_request_options* options, uint64_t* id);

/**
 * Changes what a request may spend from its next token on; tokens that are written stay. Where the new allocation needs
 * keys and values that the old one did not compute, they are computed again from the tokens, at the next step.
 * @return L2A_ERROR_BUDGET, L2A_ERROR_CONFIG, L2A_ERROR_BUNDLE where no router is open to ask the gates again,
 * L2A_ERROR_SESSION or L2A_ERROR_OUT_OF_MEMORY; the old budget stays.
 */
L2A_API l2a_status* l2a_engine_set_budget(l2a_engine* engine, uint64_t id, const l2a_budget* budget);
/**
 * Writes no more of a request; one that is done stays as it is. Its row is free at once, and with the last row all
 * memory of keys and values.
 */
L2A_API l2a_status* l2a_engine_cancel(l2a_engine* engine, uint64_t id);

/**
 * Admits what there is room for and writes one token of every row. A request that fails is done and has the error; the
 * others go on.
 * @param busy whether a request still waits or runs; may be NULL.
 * @return L2A_ERROR_OUT_OF_MEMORY where there is not even enough to say so of a request: no request is lost, and the
 * step may be tried again; else L2A_ERROR_INTERNAL at most.
 */
L2A_API l2a_status* l2a_engine_step(l2a_engine* engine, int32_t* busy);

/** Why reasoning ended. */
enum { L2A_STOPPED_BY_MODEL = 0, L2A_STOPPED_BY_CAP = 1, L2A_STOPPED_BY_TAU = 2 };

/** Where a request stands. */
typedef struct l2a_request_info {
    uint32_t struct_size;
    int32_t done;       /**< nothing more will be written */
    int32_t running;    /**< it has a row */
    int32_t stopped_by; /**< L2A_STOPPED_BY_* */
    int32_t error;      /**< l2a_code; L2A_OK where it did not fail */
    int64_t layers;     /**< that run now, 0 before that is decided */
    int64_t heads;      /**< KV groups that run now, summed over the layers */
    double cost;        /**< share of the dense layers' compute that runs now */
    l2a_budget budget;  /**< what it may spend now */
} l2a_request_info;

/** Fills the structure, whose struct_size the caller has set to its size. */
L2A_API l2a_status* l2a_engine_info(const l2a_engine* engine, uint64_t id, l2a_request_info* info);
/** Why a request failed; "" where it did not. Until the request is forgotten. */
L2A_API const char* l2a_engine_error(const l2a_engine* engine, uint64_t id);

/** Parts of what is written. */
enum { L2A_TOKENS_WRITTEN = 0 /**< all, tags included */, L2A_TOKENS_THINK = 1, L2A_TOKENS_ANSWER = 2 };

/**
 * Tokens so far, until the next step, or until the request's budget changes or it is forgotten; NULL and size 0 for an
 * unknown request.
 */
L2A_API const int64_t* l2a_engine_tokens(const l2a_engine* engine, uint64_t id, int32_t part, size_t* size);
/** Kept KV groups [num_layers] of a request, NULL before that is decided; until its budget changes. */
L2A_API const int64_t* l2a_engine_allocation(const l2a_engine* engine, uint64_t id);
/** Frees what is kept of a request; one that is not done is cancelled. */
L2A_API l2a_status* l2a_engine_forget(l2a_engine* engine, uint64_t id);

/** Queue and memory of an engine. */
typedef struct l2a_engine_stats {
    uint32_t struct_size;
    int64_t waiting;         /**< requests */
    int64_t running;         /**< requests that have a row */
    double oldest_seconds;   /**< since the first of those that wait came that has not begun */
    int64_t cache_bytes;     /**< that the caches of all rows may take */
    int64_t copied_rows;     /**< rows whose keys and values were copied for another row's sake, since the start */
    int64_t recomputed_rows; /**< requests that were computed again from their tokens, since the start */
    int64_t held_bytes;      /**< of memory that the caches of all rows have taken */
} l2a_engine_stats;

/** Fills the structure, whose struct_size the caller has set to its size. */
L2A_API l2a_status* l2a_engine_statistics(const l2a_engine* engine, l2a_engine_stats* stats);

/** @} */
/** @name Signals
 *  What the machine has left. One thread at a time.
 *  @{ */

typedef struct l2a_signals l2a_signals;

typedef struct l2a_reading {
    const char* name; /**< as in docs/signals.md, such as "host.memory_available" */
    const char* unit; /**< "bytes", "share", "seconds", "count" or "cores" */
    double value;     /**< NaN where it is not available; may be infinite */
    const char* why;  /**< why there is no value, else "" */
} l2a_reading;

/**
 * Sources of this machine: memory and load of the host, pressure (PSI), the control group (version 1 or 2), and a GPU
 * by NVML, whose library is loaded if it is there.
 * @param root of the file system, NULL for "/".
 * @param gpu index, UUID or MIG UUID of the device; NULL for none.
 */
L2A_API l2a_status* l2a_signals_create(const char* root, const char* gpu, l2a_signals** out);
L2A_API void l2a_signals_free(l2a_signals* signals);
/** Reads all sources. What is read lives until the next call. */
L2A_API l2a_status* l2a_signals_read(l2a_signals* signals, const l2a_reading** readings, size_t* size);

/** @} */
/** @name Selector
 *  What to run now, by the rules of docs/selector.md. A pure function; any thread.
 *  @{ */

typedef struct l2a_selector l2a_selector;

/**
 * @param policy a JSON object as in docs/selector.md (Policies); NULL for the default policy.
 * @param costs a JSON object whose `steps` are a cost table (`l2a bench` makes one).
 */
L2A_API l2a_status* l2a_selector_create(const char* policy, const char* costs, l2a_selector** out);
L2A_API void l2a_selector_free(l2a_selector* selector);

/** What is asked for: the request that is next, or the one whose deadline is first. */
typedef struct l2a_work {
    int64_t prompt_tokens; /**< not computed yet */
    double new_tokens;     /**< expected, reasoning included */
    double think_tokens;   /**< expected reasoning among them */
    int64_t rows;          /**< that run together with it, itself among them */
} l2a_work;

/** What the selector remembers; NaN for nothing. */
typedef struct l2a_selector_state {
    double budget;
    double since;
} l2a_selector_state;

typedef struct l2a_decision {
    uint32_t struct_size;
    l2a_budget budget;
    int64_t step;             /**< its place in the cost table */
    int32_t admit;            /**< 0 where no step fits into memory: wait, or refuse */
    const char* binding;      /**< name of the term that allows least; a constant */
    l2a_selector_state state; /**< for the next decision */
} l2a_decision;

/**
 * Decides.
 * @param readings [size]; what is missing or NaN decides nothing.
 * @param urgent what is left of the request that has `request.seconds_left`; NULL: all of `work`.
 * @param state of the decision before; NULL before the first.
 * @param now seconds on any clock that only goes forward.
 * @param decision its struct_size is set by the caller.
 * @param reasons NULL, or gets a JSON list of all terms, to be freed with l2a_text_free.
 * @return L2A_ERROR_CONFIG where the policy has no such tier.
 */
L2A_API l2a_status* l2a_selector_decide(const l2a_selector* selector, const char* tier, const l2a_reading* readings,
                                        size_t size, const l2a_work* work, const l2a_work* urgent,
                                        const l2a_selector_state* state, double now, l2a_decision* decision,
                                        char** reasons);
L2A_API void l2a_text_free(char* text);

/** @} */

#ifdef __cplusplus
}
#endif

#endif /* L2A_L2A_H_ */
