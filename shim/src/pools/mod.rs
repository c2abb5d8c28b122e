mod arena;
#[cfg(test)]
mod tests;
