#include <iostream>
#include <l2a/l2a.hpp>

int main(int count, char** arguments) {
    try {
        const l2a::Runtime runtime(count > 1 ? arguments[1] : "");
        l2a::Engine engine(runtime);
        const l2a::Request request = engine.submit({5, 6, 7, runtime.model().think});
        while (engine.step()) continue;
        std::cout << request.tokens().size() << " tokens, version " << l2a_version() << '\n';
        return request.done() ? 0 : 1;
    } catch (const l2a::Error& error) {
        std::cerr << error.what() << '\n';
        return 1;
    }
}
