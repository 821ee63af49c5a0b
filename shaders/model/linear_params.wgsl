struct LinearParams {
    in_features: u32,
    out_features: u32,
    // Packs (16 bytes) of a row of W; with its padding.
    row_packs: u32,
    // Scales of a row of W; with its padding to a multiple of 4.
    row_groups: u32,
    // The columns of y whose rows of W this binding of it holds.
    first_row: u32,
    last_row: u32,
    // Whether the result is added to y.
    accumulate: u32,
    // Added to the mean square of a row of x.
    norm_eps: f32,
    // The experts whose weights this binding holds.
    first_expert: u32,
    last_expert: u32,
}
