"""`icl-tiny`: its language, its pretraining, and the suite of SAEs made with it."""
