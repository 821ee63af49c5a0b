//! Options that every command has which loads a model, and the loading.
