// The instruction sets that this build has, that this processor runs, and the one in use.
#pragma once
#include <string>
#include <vector>

namespace minirl {

std::vector<std::string> isa_built();
std::vector<std::string> isa_supported();  // built, and run by this processor; best last
std::string isa_name();

// Uses `name` from now on. Throws std::invalid_argument with the choices where it is not supported.
void set_isa(const std::string& name);

}  // namespace minirl
