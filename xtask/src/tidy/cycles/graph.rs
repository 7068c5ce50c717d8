//! Cycles in a directed graph: its strongly connected components of more than one node (Tarjan, "Depth-first search and linear graph
//! algorithms", 1972).

/// The cycles of a graph whose node `n` has the edges `edges[n]`; nodes are in ascending order.
pub(super) fn cycles(edges: &[Vec<usize>]) -> Vec<Vec<usize>> {
    let mut search = Search {
        edges,
        index: vec![None; edges.len()],
        low: vec![0; edges.len()],
        waiting: vec![false; edges.len()],
        stack: Vec::new(),
        next: 0,
        found: Vec::new(),
    };
    for node in 0..edges.len() {
        if search.index[node].is_none() {
            search.visit(node);
        }
    }
    search.found.sort_unstable();
    search.found
}

struct Search<'a> {
    edges: &'a [Vec<usize>],
    /// In which order the nodes were visited.
    index: Vec<Option<usize>>,
    /// The earliest node on the stack that a node reaches.
    low: Vec<usize>,
    /// Whether a node is on the stack.
    waiting: Vec<bool>,
    stack: Vec<usize>,
    next: usize,
    found: Vec<Vec<usize>>,
}

impl Search<'_> {
    /// Recurses as deep as the longest chain of imports.
    fn visit(&mut self, node: usize) {
        self.index[node] = Some(self.next);
        self.low[node] = self.next;
        self.next += 1;
        self.stack.push(node);
        self.waiting[node] = true;
        for &to in &self.edges[node] {
            match self.index[to] {
                None => {
                    self.visit(to);
                    self.low[node] = self.low[node].min(self.low[to]);
                }
                Some(index) if self.waiting[to] => self.low[node] = self.low[node].min(index),
                Some(_) => {}
            }
        }
        if self.index[node] == Some(self.low[node]) {
            let mut component = Vec::new();
            while let Some(member) = self.stack.pop() {
                self.waiting[member] = false;
                component.push(member);
                if member == node {
                    break;
                }
            }
            if component.len() > 1 {
                component.sort_unstable();
                self.found.push(component);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_cycle_is_found_once() {
        assert_eq!(cycles(&[vec![1], vec![2], vec![]]), [[0; 0]; 0]);
        assert_eq!(cycles(&[vec![0, 1], vec![0]]), [[0, 1]]);
        // Two cycles that share a node are one; a third is connected to them.
        let edges = [vec![1], vec![0, 2], vec![1, 3], vec![4], vec![5], vec![4], vec![0]];
        assert_eq!(cycles(&edges), [vec![0, 1, 2], vec![4, 5]]);
    }
}
