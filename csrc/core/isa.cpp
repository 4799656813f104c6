#include "core/isa.h"
namespace tranche {
Isa isa() { return Isa::baseline; }
const char* isa_name(Isa) { return "baseline"; }
}
