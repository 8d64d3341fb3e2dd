// A chat on token ids: an example application, not a tool. Each line of the input is a prompt, as ids that end in
// <think> (it is added where it is missing), or `:budget X` for those that follow. Tokens are printed as they are
// written.
//
//     l2a_chat BUNDLE [BUDGET | auto COSTS.json]
#include <cstdlib>
#include <iostream>
#include <l2a/l2a.hpp>
#include <memory>
#include <sstream>

#include "steering.hpp"

namespace {

std::vector<int64_t> ids_of(const std::string& line, int64_t think) {
    std::istringstream words(line);
    std::vector<int64_t> ids;
    for (int64_t id = 0; words >> id;) ids.push_back(id);
    if (!words.eof()) throw std::runtime_error("not token ids: " + line);
    if (ids.empty() || ids.back() != think) ids.push_back(think);
    return ids;
}

double budget_of(const std::string& text) {
    double found = 0;
    if (!(std::istringstream(text) >> found)) throw std::runtime_error("not a budget: " + text);
    return found;
}

void write(l2a::Engine& engine, const l2a::Request& request, l2a::Budget budget, Steering* steering) {
    std::size_t told = 0;
    while (!request.done()) {
        engine.step();
        const std::vector<int64_t> written = request.tokens();
        for (; told < written.size(); ++told) std::cout << written[told] << ' ' << std::flush;
        if (steering == nullptr) continue;
        // From its next token on; a cap on reasoning is for requests that have not begun.
        const int64_t think = budget.think_tokens;
        budget = steering->decide(engine, 0).budget;
        budget.think_tokens = think;
        try {
            request.set_budget(budget);
        } catch (const l2a::Error& error) {  // the old one stays, to the end
            std::cout << "\n# " << error.what() << '\n';
            steering = nullptr;
        }
    }
    const l2a_request_info info = request.info();
    std::cout << "\n# budget " << info.budget.compute << ", cost " << info.cost << ", " << info.layers << " layers, "
              << info.heads << " KV groups\n";
}

void answer(l2a::Engine& engine, const std::vector<int64_t>& prompt, l2a::RequestOptions options, Steering* steering) {
    if (steering != nullptr) {
        const l2a_decision now = steering->decide(engine, static_cast<int64_t>(prompt.size()));
        if (now.admit == 0) {
            std::cout << "# there is no memory for another step; ask again later\n";
            return;
        }
        options.budget = now.budget;
    }
    const l2a::Request request = engine.submit(prompt, options);
    try {
        write(engine, request, options.budget, steering);
    } catch (...) {
        request.forget();
        throw;
    }
    request.forget();
}

int run(int count, char** arguments) {
    if (count < 2) {
        std::cerr << "usage: l2a_chat BUNDLE [BUDGET | auto COSTS.json]\n";
        return 2;
    }
    const l2a::Runtime runtime(arguments[1]);
    l2a::EngineOptions one;
    one.max_rows = 1;
    l2a::Engine engine(runtime, one);
    l2a::RequestOptions options;
    std::unique_ptr<Steering> steering;
    const std::string budget = count > 2 ? arguments[2] : "1";
    if (budget == "auto") {
        if (count < 4) throw std::runtime_error("auto needs a cost table, as `l2a bench --out` writes it");
        steering = std::make_unique<Steering>(runtime, arguments[3]);
    } else {
        options.budget = l2a::budget(budget_of(budget));
    }
    for (std::string line; std::getline(std::cin, line);) {
        try {
            if (line.rfind(":budget ", 0) == 0) {
                options.budget = l2a::budget(budget_of(line.substr(8)));
            } else if (!line.empty()) {
                answer(engine, ids_of(line, runtime.model().think), options, steering.get());
            }
        } catch (const std::exception& error) {  // the next line may be better
            std::cout << "# " << error.what() << '\n';
        }
    }
    return 0;
}

}  // namespace

int main(int count, char** arguments) {
    try {
        return run(count, arguments);
    } catch (const std::exception& error) {
        std::cerr << "l2a_chat: " << error.what() << '\n';
        return 1;
    }
}
