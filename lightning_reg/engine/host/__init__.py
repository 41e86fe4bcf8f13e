"""Where the suite touches Lightning, torch and the process: private names, random generators, collectives, errors."""
